"""atheris_targets.py is a program of its own: pytest does not need atheris."""

collect_ignore = ["atheris_targets.py"]

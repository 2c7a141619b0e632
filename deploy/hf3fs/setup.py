"""Builds the C library, which is no Python module, and the one module that is."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

LIBRARY = "libhf3fs_api_shared.so"  # programs look for exactly this name, in the file and in it
SOURCES = sorted(str(path) for path in Path("native").glob("*.c") if path.name != "window.c")
# native/emberfs are links to the files of emberfs itself; client.c includes them.
HEADERS = [
    *map(str, Path("native").glob("*.h")),
    *map(str, Path("native/emberfs").iterdir()),
    "hf3fs_py_usrbio/include/hf3fs_usrbio.h",
]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]


class BuildLibrary(build_ext):
    """Knows that one of the extensions is a plain shared library with a name of its own."""

    def get_ext_filename(self, fullname: str) -> str:
        """Path of what is built, relative to the place of the packages."""
        *packages, name = fullname.split(".")
        if name == LIBRARY.removesuffix(".so"):
            return str(Path(*packages, LIBRARY))
        return super().get_ext_filename(fullname)


setup(
    cmdclass={"build_ext": BuildLibrary},
    ext_modules=[
        Extension(
            "hf3fs_py_usrbio.lib.libhf3fs_api_shared",
            sources=SOURCES,
            depends=HEADERS,
            include_dirs=["native", "hf3fs_py_usrbio/include"],
            extra_compile_args=["-O2", "-std=gnu11", "-fvisibility=hidden", "-pthread", *WARNINGS],
            # nodelete: its threads and fork handlers must not outlive its code after dlclose.
            extra_link_args=["-pthread", f"-Wl,-soname,{LIBRARY},-z,nodelete,-z,defs"],
            py_limited_api=True,
        ),
        Extension(
            "hf3fs_py_usrbio._window",
            sources=["native/window.c"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            extra_compile_args=["-O2", "-Wno-missing-field-initializers", *WARNINGS],
            py_limited_api=True,
        ),
    ],
)

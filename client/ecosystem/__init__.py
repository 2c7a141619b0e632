"""What other projects' interfaces see of emberfs."""

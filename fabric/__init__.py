"""How data-plane messages and memory move between processes."""

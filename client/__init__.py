"""What applications and servers use to reach a cluster."""

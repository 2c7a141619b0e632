"""The management service: who is alive and which target serves."""

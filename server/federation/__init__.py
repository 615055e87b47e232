"""The coordinator's deployment: provisioning a federation, and running Flower's SuperLink for it."""

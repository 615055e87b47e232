"""A hospital site: the courier that the coordinator may send, and the custodian that the hospital trusts."""

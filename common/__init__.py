"""What the coordinator and the sites must agree on: configuration, messages, proxy, losses, privacy arithmetic."""

"""What coordinator and sites must agree on: configuration, messages, proxy, losses, privacy arithmetic."""

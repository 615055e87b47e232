"""What a run came to, for people: a page that opens offline, a table for terminals, and a verdict."""

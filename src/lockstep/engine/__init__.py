"""Requests to tokens: what one rank needs to decode at full speed."""

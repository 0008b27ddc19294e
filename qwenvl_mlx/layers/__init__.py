"""Blocks that several generations share."""

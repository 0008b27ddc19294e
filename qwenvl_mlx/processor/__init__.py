"""From a conversation to token ids and patches, and from tokens back to text, boxes and calls."""

"""The one generation path: prefix cache, batch, sampling, events."""

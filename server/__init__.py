"""The OpenAI-compatible server: it parses requests, calls the engine and formats answers."""

"""Systems behind OpenAI's HTTP forms: one ASGI application over any service."""

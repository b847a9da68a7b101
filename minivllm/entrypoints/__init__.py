"""What faces the outside beyond the Python API. Today: OpenAI batch files."""

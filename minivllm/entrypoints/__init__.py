"""What faces the outside beyond the Python API. Today: the first part of the OpenAI API over HTTP, and batch files."""

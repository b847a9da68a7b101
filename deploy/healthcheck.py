"""HEALTHCHECK of the image: exit 0 when /health says 200. Nothing but Python's own library, and no proxy is asked."""

import http.client
import os
import sys

try:
    connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("MINIVLLM_PORT", "8000")), timeout=5)
    connection.request("GET", "/health")
    answer = connection.getresponse()
except (OSError, http.client.HTTPException) as error:
    sys.exit(f"no answer: {error}")
if answer.status != 200:
    sys.exit(f"{answer.status} {answer.read(300).decode(errors='replace')}")

"""The code blocks of "Using Vercel AI SDK with vLLM: Complete Integration Guide", and the table of their scripts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PROGRAMS = ("typescript", "tsx")


class Block(NamedTuple):
    """Attributes:
    section: its headings, from the outside in.
    language: as the guide's fence names it.
    """

    section: str
    language: str


BLOCKS = (
    Block("Setting Up vLLM Server / 1. Starting vLLM with OpenAI-Compatible API", "bash"),
    Block("Setting Up vLLM Server / 2. Docker Deployment", "dockerfile"),
    Block("Setting Up vLLM Server / 2. Docker Deployment", "yaml"),
    Block("Setting Up vLLM Server / 3. Kubernetes Deployment", "yaml"),
    Block("Basic Integration / 1. Installation", "bash"),
    Block("Basic Integration / 2. Configuration", "typescript"),
    Block("Basic Integration / 3. Environment Variables", "bash"),
    Block("Text Generation Examples / Basic Text Generation", "typescript"),
    Block("Text Generation Examples / Streaming Text Generation", "typescript"),
    Block("Text Generation Examples / Chat Conversation", "typescript"),
    Block("Structured Outputs / JSON Generation with Zod Schema", "typescript"),
    Block("Structured Outputs / Streaming Objects", "typescript"),
    Block("Tool Calling / Basic Tool Usage", "typescript"),
    Block("Tool Calling / Streaming Tool Calls", "typescript"),
    Block("React Server Components Integration / Server Component Example", "tsx"),
    Block("React Server Components Integration / Streaming in Server Components", "tsx"),
    Block("Client-Side Integration with Hooks / useChat Hook", "tsx"),
    Block("Client-Side Integration with Hooks / useCompletion Hook", "tsx"),
    Block("Advanced Configuration / Custom Headers and Authentication", "typescript"),
    Block("Advanced Configuration / Provider-Specific Options", "typescript"),
    Block("Advanced Configuration / Multiple Model Configurations", "typescript"),
    Block("Guided Generation with vLLM / JSON Schema Constraints", "typescript"),
    Block("Guided Generation with vLLM / Regex Patterns", "typescript"),
    Block("Guided Generation with vLLM / Choice Constraints", "typescript"),
    Block("Error Handling and Retries / Comprehensive Error Handling", "typescript"),
    Block("Error Handling and Retries / Custom Retry Logic", "typescript"),
    Block("Monitoring and Observability / Request Logging", "typescript"),
    Block("Monitoring and Observability / Metrics Collection", "typescript"),
    Block("Production Best Practices / 1. Load Balancing Multiple vLLM Instances", "typescript"),
    Block("Production Best Practices / 2. Caching Responses", "typescript"),
    Block("Production Best Practices / 3. Rate Limiting", "typescript"),
    Block("Production Best Practices / 4. Environment-Specific Configuration", "typescript"),
    Block("Troubleshooting / Common Issues and Solutions / 1. Connection Refused", "typescript"),
    Block("Troubleshooting / Common Issues and Solutions / 2. Model Not Found", "typescript"),
    Block("Troubleshooting / Common Issues and Solutions / 3. Out of Memory", "typescript"),
    Block("Troubleshooting / Common Issues and Solutions / 4. Compatibility Mode Issues", "typescript"),
    Block("Performance Optimization Tips / 1. Enable vLLM Optimizations", "bash"),
    Block("Performance Optimization Tips / 2. Optimize Client Configuration", "typescript"),
    Block("Performance Optimization Tips / 3. Batch Processing", "typescript"),
)


def rows_under(heading: str, readme: str) -> list[list[str]]:
    """The cells of the first table under a heading, without backticks; its own heading is left out."""
    text = readme.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    table = re.search(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    lines = table[0].splitlines() if table else []
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines[2:]]


def sections_without_a_script(blocks: Iterable[Block], rows: Iterable[list[str]]) -> list[str]:
    """Programs of the guide that a table `section | script | ...` lacks, and rows of no program."""
    programs = {block.section for block in blocks if block.language in PROGRAMS}
    listed = {row[0] for row in rows}
    return [f"no script: {section}" for section in sorted(programs - listed)] + [
        f"no such program: {section}" for section in sorted(listed - programs)
    ]


def wrong_scripts(folder: Path, rows: Iterable[list[str]]) -> list[str]:
    """Scripts that a table names and `folder` lacks, or whose first lines say something else; and forgotten ones."""
    found = []
    named = set()
    for section, name, *_ in rows:
        named.add(name)
        path = folder / name
        if not path.exists():
            found.append(f"missing: {folder.name}/{name}")
            continue
        first, second, *_ = path.read_text(encoding="utf-8").splitlines()
        if first != f"// Guide: {section}":
            found.append(f"{folder.name}/{name}: begins with {first!r}, not with its section")
        if not second.startswith("// Expect: "):
            found.append(f"{folder.name}/{name}: does not say what to expect")
    forgotten = {path.name for path in folder.glob("*.mjs")} - named
    return found + [f"not in the table: {folder.name}/{name}" for name in sorted(forgotten)]

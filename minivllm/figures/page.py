"""Figure: a piece of HTML that needs nothing else: no script, no font, no request, and the colours of either theme.

    text in the colour of the page around it, backgrounds as one hue with an opacity: readable on light and on dark
    every rule is below .minivllm-figure, so that a page with several figures, and its own styles, stays as it is

Knows no token. Called by heatmap.py and comparison.py. Twin in vLLM: none.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

STYLE = """
.minivllm-figure{font:14px/1.9 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:1em 0;color:inherit}
.minivllm-figure figcaption{font:13px/1.5 system-ui,sans-serif;margin-bottom:.5em}
.minivllm-figure figcaption b{font-size:15px}
.minivllm-figure .tokens{white-space:pre-wrap;overflow-wrap:anywhere}
.minivllm-figure .token{border-radius:3px;padding:2px 1px;margin:0 1px 4px;display:inline-block;line-height:1.25;
vertical-align:top}
.minivllm-figure .token small{display:block;font-size:9px;line-height:1.1;opacity:.75}
.minivllm-figure .blank{opacity:.35}
.minivllm-figure .unknown{outline:1px dotted currentColor;outline-offset:-1px}
.minivllm-figure .part{font:11px system-ui,sans-serif;opacity:.7;text-transform:uppercase;letter-spacing:.06em}
.minivllm-figure .legend{display:inline-block;width:9em;height:.8em;border-radius:3px;vertical-align:middle;
margin:0 .5em}
.minivllm-figure .runs{display:grid;grid-template-columns:1fr 1fr;gap:0 1.5em}
.minivllm-figure .runs>div{border-top:2px solid rgba(128,128,128,.5);padding-top:.2em;min-width:0}
.minivllm-figure .runs .part{margin-bottom:.4em}
.minivllm-figure .first{outline:2px solid rgb(217,72,15);background:rgba(217,72,15,.25)}
.minivllm-figure .after{opacity:.55}
@media(max-width:600px){.minivllm-figure .runs{grid-template-columns:1fr;gap:.8em}}
"""

PAGE = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    "<title>{title}</title><style>:root{{color-scheme:light dark}}body{{margin:2em auto;max-width:60em;padding:0 1em}}"
    "</style>{body}</html>"
)


@dataclass(frozen=True, slots=True)
class Figure:
    """html: one <figure>, styles included."""

    title: str
    html: str

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | Path) -> Path:
        """Write a page with this figure alone; returns its path."""
        path = Path(path)
        path.write_text(PAGE.format(title=html.escape(self.title), body=self.html), encoding="utf-8")
        return path


def figure(title: str, caption: str, body: str) -> Figure:
    """Put a figure together. title: plain text. caption, body: HTML, escaped already."""
    head = f"<figcaption><b>{html.escape(title)}</b> {caption}</figcaption>"
    return Figure(title, f'<figure class="minivllm-figure"><style>{STYLE}</style>{head}{body}</figure>')

"""The page as it is sent: open to all, in one piece, with a policy that names its script and its style, and shipped.

tests/ui has it in a browser.
"""

from __future__ import annotations

import base64
import configparser
import hashlib
import re

import pytest

from minivllm import AsyncEngine
from minivllm.entrypoints.page import Page, content_security_policy
from minivllm.entrypoints.service import ServerConfig
from tests.entrypoints.helpers import Web
from tests.house.source import ROOT

HTML = (ROOT / "minivllm" / "entrypoints" / "ui" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("keys", [(), ("secret",)], ids=["open", "keys"])
def test_the_page_is_sent_to_everybody(engine: AsyncEngine, keys: tuple[str, ...]):
    reply = Web(engine, ServerConfig(api_keys=keys)).get("/")
    assert reply.status == 200 and reply.headers["Content-Type"] == "text/html; charset=utf-8"
    assert reply.text == HTML
    assert reply.headers["X-Content-Type-Options"] == "nosniff" and reply.headers["Cache-Control"] == "no-cache"


def test_the_policy_names_script_and_style_by_their_hashes():
    policy = dict(part.split(" ", 1) for part in Page.load().policy.split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    for tag in ("script", "style"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", HTML, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert "unsafe" not in Page.load().policy and "http" not in Page.load().policy


def test_another_script_has_another_policy():
    one, two = (content_security_policy(f"<style>a</style><script>{body}</script>") for body in ("1", "2"))
    assert one != two and one.count("sha256-") == two.count("sha256-") == 2


def test_the_page_needs_nothing_from_elsewhere_and_writes_no_html():
    """The one address in it is a name space, and the icon is in the page."""
    assert set(re.findall(r"https?://[^\s'\"]+", HTML)) == {"http://www.w3.org/2000/svg"}
    assert re.findall(r"<(?:script|link|img|iframe|object|embed)\b[^>]*\b(?:src|href)=\"(?!data:)", HTML) == []
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser", "srcdoc"):
        assert sink not in HTML
    assert re.findall(r"\s(?:on\w+|style)=", HTML) == []  # the policy would refuse them


def test_the_page_is_in_the_package():
    parser = configparser.ConfigParser()
    parser.read_string((ROOT / "setup.cfg").read_text(encoding="utf-8"))
    lines = parser["options.package_data"]["minivllm.entrypoints"].split()
    folder = ROOT / "minivllm" / "entrypoints"
    shipped = {path for pattern in lines for path in folder.glob(pattern)}
    there = {path for path in (folder / "ui").rglob("*") if path.is_file()}
    assert there == shipped == {folder / "ui" / "index.html"}

"""The app is built once; one browser for all; every test gets an empty page of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import BrowserContext

from tests.app import web_app
from tests.app.model import Model
from tests.app.view import View
from tests.sdk.test_sdk import install
from tests.ui.browser import open_browser

Say = Callable[[str], None]


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Say:
    """Progress, for whoever waits."""
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    return lambda text: reporter.write_line(f"\n{text} ...")


@pytest.fixture(scope="session")
def packages(say: Say) -> None:
    say("npm ci")
    install(str(web_app.FOLDER))


@pytest.fixture(scope="session")
def built(packages: None, say: Say) -> None:
    say("npm run build")
    web_app.build()


@pytest.fixture(scope="session")
def browser() -> Iterator[BrowserContext]:
    with open_browser(viewport={"width": 1280, "height": 800}) as context:
        yield context


@pytest.fixture(scope="session")
def scripted_model() -> Iterator[Model]:
    model = Model()
    yield model
    model.close()


@pytest.fixture(scope="session")
def scripted_app(built: None, scripted_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = {"VLLM_MODEL": "scripted", "VLLM_API_KEY": "secret"}
    with web_app.running("start", scripted_model.url, tmp_path_factory.mktemp("scripted"), **settings) as url:
        yield url


@pytest.fixture
def model(scripted_model: Model) -> Iterator[Model]:
    """It will say what the test says."""
    scripted_model.reset()
    yield scripted_model
    scripted_model.give(1000)  # nobody waits any more


@pytest.fixture
def view(browser: BrowserContext, scripted_app: str, model: Model) -> Iterator[View]:
    view = View(browser.new_page(), scripted_app)
    yield view
    view.close()

"""The page in a real browser, against a real server without a model."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest

from tests.pipelines.serve.page_server import FIRST_SEED, JOB_SIDE_PX, MODEL, PageServer, colour

sync_api = pytest.importorskip("playwright.sync_api", reason="no browser's driver: pip install playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser for the page: apt install chromium")

Page: TypeAlias = Any
Visit: TypeAlias = Callable[..., Page]

CLASSES = MODEL | {
    "id": "classes",
    "takes_prompt": False,
    "classes": ["cat", "<b>dog</b>"],
    "max_steps": 50,
    "max_guidance": 9.0,
    "max_images": 2,
    "upscale_sizes_px": [],
}
EXPECT_MS = 10_000
KEY = "s3cret"

expect = sync_api.expect


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    expect.set_options(timeout=EXPECT_MS)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[PageServer]:
    with PageServer() as server:
        yield server


@pytest.fixture
def visit(browser: Any, server: PageServer) -> Iterator[Visit]:
    """(options of a browser's context) → the page, which must not fail, break its policy or go elsewhere."""
    contexts, faults = [], []

    def visit(**options: Any) -> Page:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: "Policy" in message.text and faults.append(message.text))
        local = (server.url, "blob:", "data:")
        page.on("request", lambda sent: sent.url.startswith(local) or faults.append(sent.url))
        page.clock.install()
        page.goto(server.url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert faults == []


def field(page: Page, label: str) -> Any:
    return page.get_by_label(label, exact=True)


def button(page: Page, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def finished(page: Page) -> Any:
    return page.locator("#gallery img[src^='blob:']")


def alert(page: Page, text: str) -> Any:
    return page.get_by_role("alert").get_by_text(text, exact=True)


def generate(page: Page, **values: str) -> None:
    for label, value in values.items():
        field(page, label).fill(value)
    button(page, "Generate").click()


def wait_1s(page: Page) -> None:
    """The page's clock runs as ever, but does not keep a test waiting."""
    page.clock.fast_forward(1000)


def start_job(page: Page, server: PageServer) -> None:
    generate(page, Seed="1")
    button(page, "Upscale").click()
    expect(page.locator(".job")).to_have_count(1)
    assert len(server.jobs) == 1


def pixel(page: Page, selector: str) -> list[int]:
    """RGB in the middle of an image."""
    script = """async (image) => {
        await image.decode();
        const context = new OffscreenCanvas(1, 1).getContext("2d");
        context.drawImage(image, image.naturalWidth / 2, image.naturalHeight / 2, 1, 1, 0, 0, 1, 1);
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
    }"""
    rgb: list[int] = page.locator(selector).first.evaluate(script)
    return rgb


def enter_key(page: Page, key: str) -> None:
    field(page, "Key").fill(key)
    button(page, "Continue").click()


def test_previews_are_seen_while_it_runs_and_then_the_image(visit: Visit, server: PageServer) -> None:
    server.hold_at = 3
    page = visit()
    generate(page, Prompt="a lighthouse", Seed="5", Images="2")

    expect(page.get_by_text("Step 3 of 5")).to_have_count(2)
    expect(page.locator("#gallery progress").first).to_have_attribute("value", "3")
    expect(page.locator("#announcer")).to_have_text("Half is done.")
    assert pixel(page, "#gallery img[src^='data:']") == list(colour(5))
    shown_px = page.locator("#gallery img").first.bounding_box()["width"]
    assert shown_px > page.locator("#gallery img").first.evaluate("image => image.naturalWidth")

    server.released.set()
    expect(finished(page)).to_have_count(2)
    expect(page.locator("#announcer")).to_have_text("2 images done.")
    assert pixel(page, "#gallery img") == list(colour(5))
    assert server.bodies == [
        {
            "model": "photos",
            "prompt": "a lighthouse",
            "negative_prompt": "",
            "n": 2,
            "size": "256x256",
            "num_inference_steps": 5,
            "guidance_scale": 7.5,
            "scheduler": "dpmpp",
            "seed": 5,
            "stream": True,
            "partial_images": 5,
        }
    ]
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").first.click()
    assert download.value.suggested_filename == "5.png"


def test_cancel_ends_the_request_at_the_server(visit: Visit, server: PageServer) -> None:
    server.hold_at = 2
    page = visit()
    for cancel in (button(page, "Cancel").click, lambda: page.keyboard.press("Escape")):
        generate(page)
        expect(page.get_by_text("Step 2 of 5")).to_be_visible()
        assert not server.left.is_set()

        cancel()

        expect(page.locator("#gallery .card")).to_have_count(0)
        expect(button(page, "Generate")).to_be_focused()
        assert server.left.wait(10)
        expect(page.locator("#alert")).to_be_empty()
        server.left.clear()


def test_errors_are_told_beside_the_form(visit: Visit, server: PageServer) -> None:
    page = visit()

    def told(text: str) -> None:
        generate(page)
        expect(alert(page, text)).to_be_visible()
        expect(page.locator("#gallery .card")).to_have_count(0)
        expect(button(page, "Generate")).to_be_enabled()

    server.refuse(429, "the queue is full", 7)
    told("the queue is full. Try again in 7 s.")
    server.refuse(400, "<img src=x onerror=alert(1)>")
    told("<img src=x onerror=alert(1)>.")
    server.refusal, server.trouble = None, "a replica died"
    told("a replica died.")
    page.route("**/v1/images/*", lambda route: route.abort())
    told("The server cannot be reached.")


def test_a_server_that_is_not_up_yet_is_asked_again(visit: Visit, server: PageServer) -> None:
    error = {"error": {"message": "the model is loading"}}
    page = visit()
    page.route(
        "**/v1/models",
        lambda route: route.fulfill(status=503, headers={"Retry-After": "1"}, json=error),
        times=1,
    )
    page.reload()

    expect(alert(page, "the model is loading. Try again in 1 s.")).to_be_visible()
    wait_1s(page)
    expect(button(page, "Generate")).to_be_enabled()
    expect(page.locator("#alert")).to_be_empty()


def test_fields_have_the_limits_of_the_model(visit: Visit, server: PageServer) -> None:
    server.models = [MODEL, CLASSES]
    page = visit()
    field(page, "Model").select_option("classes")

    expect(field(page, "Prompt")).to_be_hidden()
    expect(field(page, "Negative prompt")).to_be_hidden()
    assert field(page, "Class").locator("option").all_inner_texts() == ["No class", "cat", "<b>dog</b>"]
    attributes = "field => [field.min, field.max, field.step].join()"
    found = {label: field(page, label).evaluate(attributes) for label in ("Images", "Steps", "Guidance")}
    assert found == {"Images": "1,2,1", "Steps": "1,50,1", "Guidance": "0,9,any"}

    generate(page, Steps="51")
    expect(field(page, "Steps")).to_be_focused()
    assert server.bodies == []

    field(page, "Class").select_option("<b>dog</b>")
    generate(page, Steps="2")
    expect(finished(page)).to_have_attribute("alt", "<b>dog</b>")
    expect(button(page, "Upscale")).to_be_hidden()
    assert server.bodies[0]["class_label"] == 1
    assert "prompt" not in server.bodies[0]


def test_suggested_sizes_are_those_that_the_model_can_make(visit: Visit) -> None:
    cases = [("256x256", 64, 512), ("1024x1024", 64, 1024), ("320x192", 32, 448), ("8x8", 8, 8)]
    script = """async ([default_size, size_multiple_px, max_side_px]) => {
        const { suggestedSizes } = await import("/page/sizes.js");
        return Object.values(suggestedSizes({ default_size, size_multiple_px, max_side_px })).flat();
    }"""
    page = visit()
    for default, multiple, most in cases:
        sizes = page.evaluate(script, [default, multiple, most])
        sides = [int(side) for size in sizes for side in size.split("x")]
        assert default in sizes
        assert len(set(sizes)) == len(sizes)
        assert all(side % multiple == 0 and 0 < side <= most for side in sides)
    assert page.evaluate(script, cases[0])[:5] == ["128x128", "192x192", "256x256", "384x384", "512x512"]


def test_events_are_the_same_however_the_bytes_come(visit: Visit) -> None:
    text = ": hello\r\nevent: a\r\ndata: {é}\r\n\r\ndata: 1\ndata: 2\n\n\r\rid: 3\rdata:x\r\rdata: not whole"
    script = """async ([text, size]) => {
        const { events } = await import("/page/event_stream.js");
        const bytes = new TextEncoder().encode(text);
        const chunks = Array.from({ length: Math.ceil(bytes.length / size) },
            (_, index) => bytes.slice(index * size, (index + 1) * size));
        const body = new ReadableStream({ start(controller) {
            chunks.forEach((chunk) => controller.enqueue(chunk));
            controller.close();
        } });
        const found = [];
        for await (const { event, data } of events(new Response(body))) found.push([event, data]);
        return found;
    }"""
    page = visit()
    for chunk_bytes in (1, 2, 3, 7, 1000):
        found = page.evaluate(script, [text, chunk_bytes])
        assert found == [["a", "{é}"], ["message", "1\n2"], ["message", "x"]]


def test_settings_are_reused_with_a_seed_of_63_bits(visit: Visit, server: PageServer) -> None:
    page = visit()
    field(page, "Size").select_option("320x192")
    generate(page, Prompt='"seed":"7"', Guidance="2.25", Images="2")
    expect(finished(page)).to_have_count(2)
    generate(page, Prompt="other", Guidance="3", Seed="4", Images="1")
    expect(finished(page)).to_have_count(3)

    page.get_by_role("button", name=f"Seed {FIRST_SEED + 1}").click()
    expect(field(page, "Seed")).to_be_focused()
    expect(field(page, "Size")).to_have_value("320x192")
    generate(page)
    expect(finished(page)).to_have_count(4)

    assert "seed" not in server.bodies[0]
    assert server.bodies[2] == server.bodies[0] | {"n": 1, "seed": FIRST_SEED + 1}
    assert pixel(page, "#gallery img") == list(colour(FIRST_SEED + 1))


def test_a_job_is_followed_to_its_end_and_seen_in_the_zoom_view(visit: Visit, server: PageServer) -> None:
    server.key = KEY
    page = visit()
    enter_key(page, KEY)
    generate(page, Prompt="a lighthouse", Seed="1")
    sizes = field(page, "Upscale to").locator("option")
    assert sizes.all_inner_texts() == ["1024 px", "2048 px"]
    button(page, "Upscale").click()
    expect(page.locator(".job")).to_contain_text("Waiting")
    streamed, upscaled = server.bodies
    assert upscaled.pop("upscale_to") == 1024
    assert streamed == upscaled | {"stream": True, "partial_images": 5}

    server.move_job(status="running", stage="upsampling 1", progress=0.43, has_preview=True)
    wait_1s(page)
    expect(page.locator(".job")).to_contain_text("Upsampling 1, 43 %")
    expect(page.locator(".job progress")).to_have_attribute("value", "0.43")
    expect(page.locator(".job img")).to_be_visible()
    assert pixel(page, ".job img") == list(colour(1))

    server.move_job(status="completed", progress=1.0, size=f"{JOB_SIDE_PX}x{JOB_SIDE_PX}")
    wait_1s(page)
    button(page, "Open").click()
    expect(page.get_by_role("dialog", name="Seed 1, 1024 × 1024")).to_be_visible()
    page.wait_for_function(
        """(rgb) => {
            const canvas = document.querySelector("#viewer canvas");
            const [x, y] = [canvas?.width / 2, canvas?.height / 2];
            const found = canvas?.getContext("2d").getImageData(x, y, 1, 1).data;
            return found?.[3] === 255 && rgb.every((value, index) => Math.abs(value - found[index]) < 6);
        }""",
        arg=list(colour(1)),
    )
    assert "10/1_1" in server.tiles
    page.keyboard.press("Escape")
    expect(page.locator("#viewer")).to_be_hidden()
    expect(button(page, "Open")).to_be_focused()

    with page.expect_download() as download:
        page.locator(".job").get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "1.png"


def test_jobs_are_there_after_a_reload_and_can_be_cancelled(visit: Visit, server: PageServer) -> None:
    page = visit()
    start_job(page, server)
    server.move_job(status="completed", size="1024x1024")
    server.add_job({"seed": 2**63 - 1})
    page.reload()

    expect(page.locator(".job-title")).to_have_text([f"Seed {2**63 - 1}", "Seed 1, 1024 × 1024"])
    button(page, "Cancel").last.click()
    expect(page.locator(".job").first).to_contain_text("Cancelled")
    assert server.jobs["job-1"]["status"] == "cancelled"
    expect(page.locator(".job").first).to_be_focused()

    with page.expect_download() as download:
        page.locator(".job").get_by_role("link", name="Download").click()
    assert download.value.url == f"{server.url}/v1/jobs/job-0/content"


def test_a_job_that_fails_or_is_refused_says_why(visit: Visit, server: PageServer) -> None:
    page = visit()
    start_job(page, server)
    server.move_job(status="failed", error={"message": "the disk is full"})
    wait_1s(page)
    expect(page.locator(".job").get_by_role("alert")).to_have_text("the disk is full")

    server.refuse(429, "too many jobs", 30)
    button(page, "Upscale").click()
    expect(page.locator("#gallery").get_by_role("alert")).to_have_text("too many jobs. Try again in 30 s.")


def test_the_key_is_asked_for_and_kept_in_the_session_only(visit: Visit, server: PageServer) -> None:
    server.key = KEY
    page = visit()
    expect(page.get_by_role("dialog", name="API key")).to_be_visible()
    page.keyboard.press("Escape")
    expect(alert(page, "The server asks for an API key.")).to_be_visible()

    button(page, "API key").click()
    enter_key(page, "wrong")
    expect(alert(page, "The server does not know this key.")).to_be_visible()
    enter_key(page, KEY)
    expect(page.locator("#key-dialog")).to_be_hidden()
    button(page, "API key").click()
    expect(page.locator("#key-alert")).to_be_empty()
    page.keyboard.press("Escape")
    generate(page)
    expect(finished(page)).to_have_count(1)
    expect(page.locator("#alert")).to_be_empty()

    page.reload()
    expect(button(page, "Generate")).to_be_enabled()
    stores = "[Object.values(sessionStorage), Object.values(localStorage), document.cookie]"
    assert page.evaluate(stores) == [[KEY], [], ""]


def test_the_keyboard_alone_is_enough(visit: Visit, server: PageServer) -> None:
    page = visit()
    expect(button(page, "Generate")).to_be_enabled()

    def tab_to(target: Any) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            outline = page.evaluate("getComputedStyle(document.activeElement).outline")
            assert "solid 2px" in outline or page.evaluate("document.activeElement === document.body")
            if target.evaluate("target => target === document.activeElement"):
                return
        pytest.fail(f"Tab does not come to {target}")

    tab_to(field(page, "Prompt"))
    page.keyboard.type("a lighthouse")
    tab_to(button(page, "Draw a seed"))
    page.keyboard.press("Enter")
    page.keyboard.press("Control+Enter")
    expect(finished(page)).to_have_count(1)
    assert server.bodies[0]["prompt"] == "a lighthouse"
    assert 0 <= server.bodies[0]["seed"] < 2**32

    tab_to(button(page, "Upscale"))
    page.keyboard.press("Enter")
    expect(page.locator(".job")).to_have_count(1)
    server.move_job(status="completed", size="1024x1024")
    wait_1s(page)
    expect(button(page, "Open")).to_be_visible()
    button(page, "Upscale").evaluate("() => document.activeElement.blur()")
    tab_to(button(page, "Open"))
    page.keyboard.press("Enter")
    expect(page.locator("#viewer .openseadragon-canvas")).to_be_focused()
    tab_to(button(page, "Close"))
    page.keyboard.press("Enter")
    expect(button(page, "Open")).to_be_focused()


def test_a_phone_needs_no_horizontal_scroll(visit: Visit, server: PageServer) -> None:
    server.models = [MODEL | {"id": "m" * 80, "classes": ["c" * 90], "default_size": "512x512"}]
    page = visit(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    spare_px = "Math.min(innerWidth, screen.width) - document.documentElement.scrollWidth"

    generate(page, Prompt="w" * 300, Images="2")
    expect(finished(page)).to_have_count(2)
    button(page, "Upscale").first.click()
    expect(page.locator(".job")).to_have_count(1)
    server.move_job(
        status="failed", error={"message": "x" * 200}, size="16384x16384", stage="s" * 50, has_preview=True
    )
    wait_1s(page)
    server.refuse(400, "e" * 200)
    generate(page)
    expect(page.locator("#alert")).to_contain_text("eee")
    expect(page.locator(".job")).to_contain_text("xxx")
    assert page.evaluate(spare_px) == 0
    page.set_viewport_size({"width": 320, "height": 640})
    assert page.evaluate(spare_px) == 0

    page.locator("#gallery .picture").first.click()
    expect(page.locator("#viewer canvas")).to_be_visible()
    assert page.locator("#viewer").evaluate("viewer => viewer.scrollWidth") == 320


AUDIT = """() => {
    const luminance = (text) => {
        const [r, g, b] = text.match(/[\\d.]+/g).map((part) => part / 255)
            .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (node) => {
        const colour = getComputedStyle(node).backgroundColor;
        return colour === "rgba(0, 0, 0, 0)" ? ground(node.parentElement) : colour;
    };
    const contrast = (node) => {
        const pair = [getComputedStyle(node).color, ground(node)].map(luminance).sort((a, b) => b - a);
        return (pair[0] + 0.05) / (pair[1] + 0.05);
    };
    const seen = [...document.body.querySelectorAll("*")].filter((node) => node.checkVisibility());
    const named = (node) => node.labels?.length || node.ariaLabel || node.textContent.trim()
        || node.querySelector("img[alt]:not([alt=''])");
    const texts = seen.filter((node) => !node.closest(":disabled, svg, .unseen")
        && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
    const ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
    return {
        numTexts: texts.length,
        pale: texts.filter((node) => contrast(node) < 4.5).map((node) => node.outerHTML),
        unnamed: seen.filter((node) => node.matches("input, select, textarea, button, a, progress"))
            .filter((node) => !named(node)).map((node) => node.outerHTML),
        withoutAlt: seen.filter((node) => node.matches("img:not([alt])")).map((node) => node.outerHTML),
        twice: ids.filter((id, index) => ids.indexOf(id) !== index),
        moving: document.getAnimations().length,
    };
}"""


def test_all_is_named_readable_and_still(visit: Visit, server: PageServer) -> None:
    server.models = [MODEL | {"classes": ["cat"]}]
    page = visit(reduced_motion="reduce")
    start_job(page, server)
    server.add_job({"seed": 9}).update(status="failed", error={"message": "the disk is full"})
    server.hold_at = 2
    generate(page, Images="2")
    expect(page.get_by_text("Step 2 of 5")).to_have_count(2)
    wait_1s(page)
    expect(page.locator(".job")).to_have_count(2)

    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        found = page.evaluate(AUDIT)
        assert found.pop("numTexts") > 25
        assert found == {"pale": [], "unnamed": [], "withoutAlt": [], "twice": [], "moving": 0}

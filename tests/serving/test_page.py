"""The page in a browser: drawing, painting and drawing anew, at the width of a telephone."""

import json
import re
import shutil
import subprocess
import threading

import pytest
from growing import make_studio, serving
from waiting import LIMIT

from djepa_jax.serving import server as server_module

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync")
FLAGS += ("--hide-scrollbars", "--enable-logging=stderr", "--v=0", "--remote-debugging-port=0")
# What a person would do, put into the page that the test serves.
PLAY = """
(async () => {
  const until = async (what, still = () => !what()) => {
    for (let i = 0; still() && i < 15000; i++) await new Promise((go) => setTimeout(go, 20));
    if (!what()) throw new Error(`waited for ${what}: ${$("state").textContent}`);
  };
  const shown = new Set();
  const seen = new MutationObserver((records) => {  // a busy machine shows several at once
    for (const { oldValue, removedNodes } of records) {
      const gone = [...removedNodes].map((figure) => figure.querySelector?.("img")?.src);
      for (const address of [oldValue, ...gone]) if (address) shown.add(address);
    }
  });
  const old = { attributeFilter: ["src"], attributeOldValue: true };
  seen.observe($("tiles"), { subtree: true, childList: true, ...old });
  await until(() => model);
  $("labels").value = "3";
  $("seed").value = "5";
  $("num_ar_steps").value = model.choices.num_ar_steps.length - 1;
  $("go").click();
  await until(() => $("state").textContent.startsWith("Done"));
  const first = document.querySelector("#tiles img").src, command = $("command").textContent;
  document.querySelector("#tiles button").click();
  await until(() => !canvas.hidden && document.activeElement === canvas);
  const press = (key) => canvas.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  for (const key of [" ", "ArrowLeft", " "]) press(key);
  const box = canvas.getBoundingClientRect();
  const at = (type, x) => canvas.dispatchEvent(
    new PointerEvent(type, { clientX: box.left + x, clientY: box.top + 9, buttons: 1 }));
  canvas.setPointerCapture = () => {};
  at("pointerdown", 5);
  at("pointermove", 60);
  const painted = $("painted").textContent, mask = $("mask").href.slice(0, 21);
  $("redraw").click();
  await until(() => $("command").textContent.includes("--mode=edit"));
  const second = document.querySelector("#tiles img").src;
  const inputs = [...document.querySelectorAll("input, select, textarea")];
  console.log("found " + JSON.stringify({
    shown: shown.add(first).size, command, painted, mask, changed: first !== second,
    unnamed: inputs.filter((x) => !x.labels?.length && !x.ariaLabel).map((x) => x.id),
    width: [document.documentElement.scrollWidth, innerWidth],
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    background: getComputedStyle(document.body).backgroundColor,
  }));
})().catch((error) => console.log("found " + JSON.stringify({ error: String(error) })));
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to look at pages with")
def test_a_browser_draws_and_paints(tmp_path, monkeypatch):
    """In a frame, since no window is as narrow as a telephone; in the dark."""
    html = server_module.PAGE.read_text()
    played = tmp_path / "page.html"
    played.write_text(html.replace("\n</script>", f"{PLAY}</script>"))
    monkeypatch.setattr(server_module, "PAGE", played)
    policy = server_module.POLICY.replace("; frame-ancestors 'none'", "")
    monkeypatch.setattr(server_module, "POLICY", policy)
    frame = tmp_path / "frame.html"
    with serving(make_studio(monkeypatch)) as server:
        style = "color-scheme: light dark; border: 0; height: 900px"
        frame.write_text(f'<iframe src="{server.url}" width="400" style="{style}"></iframe>')
        own = [f"--user-data-dir={tmp_path / 'profile'}", frame.as_uri()]
        command = [CHROMIUM, *FLAGS, "--blink-settings=preferredColorScheme=0", *own]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as browser:
            watchdog = threading.Timer(LIMIT, browser.kill)
            watchdog.start()
            said = next((line for line in browser.stderr if "CONSOLE" in line), "it has ended")
            watchdog.cancel()
            browser.kill()
    found = re.search(r'"found (.*?)", source', said)
    assert found and "error" not in found[1], said
    of = json.loads(found[1])
    assert of["shown"] >= 5, "those that grow, and the last"
    assert "sample.seed=5" in of["command"] and "sample.labels=3" in of["command"]
    assert of["changed"] and of["mask"] == "data:image/png;base64" and of["painted"] > "1"
    assert of["width"] == [400, 400] and of["unnamed"] == []
    assert of["dark"] and of["background"] == "rgb(18, 21, 24)"

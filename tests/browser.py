"""Chromium without a window, told what to do by the DevTools protocol over a pipe: no driver, no port.

    with Browser(tmp_path) as browser:
        browser.open("http://127.0.0.1:7860/")
        browser.wait("document.title == 'ready'")
"""
import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--remote-debugging-pipe", "--mute-audio", "--use-fake-device-for-media-stream",
         "--use-fake-ui-for-media-stream",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]


class Browser:
    """A browser with one page; `hum` is the recording that its microphone hears."""

    def __init__(self, folder, hum=None):
        self.errors = []        # what went wrong in the page, violations of its security policy included
        self.count, self.session, self.received = 0, {}, b""
        command_end, self.commands = os.pipe()
        self.answers, answer_end = os.pipe()

        def connect():          # the browser reads from 3 and writes to 4
            ends = os.dup(command_end), os.dup(answer_end)
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)
        argv = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}/profile"]
        if hum:
            argv.append(f"--use-file-for-fake-audio-capture={hum}")
        self.process = subprocess.Popen([*argv, "about:blank"], preexec_fn=connect, pass_fds=(3, 4),
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(command_end)
        os.close(answer_end)
        self.new_page()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with contextlib.suppress(OSError, EOFError):
            self.session = {}
            self.call("Browser.close")
        self.process.wait(30)
        os.close(self.commands)
        os.close(self.answers)

    def new_page(self):
        self.session = {}
        self.target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=self.target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for part in ("Page", "Runtime", "Log"):
            self.call(f"{part}.enable")

    def close_page(self):
        self.call("Target.closeTarget", targetId=self.target)

    def message(self) -> dict:
        while b"\0" not in self.received:
            ready, _, _ = select.select([self.answers], [], [], 60)
            piece = os.read(self.answers, 2 ** 16) if ready else b""
            if not piece:
                raise EOFError("the browser does not answer")
            self.received += piece
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **parameters) -> dict:
        """A command of the protocol and what it returns."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters, **self.session}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.message()
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(json.dumps(answer["params"])[:1000])
            if answer.get("id") == self.count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def run(self, expression: str):
        """The value of a JavaScript expression, awaited."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True,
                           userGesture=True)
        assert "exceptionDetails" not in result, f"{expression}: {result['exceptionDetails']}"[:1000]
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 30):
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while True:
            value = self.run(expression)
            if value:
                return value
            if time.monotonic() > end:
                said = self.run("document.body.innerText")
                raise AssertionError(f"not within {seconds} s: {expression}; {self.errors}; the page: {said}")
            time.sleep(0.02)

    def open(self, url: str):
        self.call("Page.navigate", url=url)
        self.wait("document.readyState == 'complete' && location.href != 'about:blank'")

    def click(self, selector: str):
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def text(self, selector: str) -> str:
        return self.run(f"document.querySelector({json.dumps(selector)})?.textContent")

    def press(self, key: str):
        """A key, as from the keyboard."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9, " ": 32}
        typed = {"Enter": "\r", " ": " "}.get(key, "" if len(key) > 1 else key)
        code = codes.get(key) or ord(key.upper())
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=typed, windowsVirtualKeyCode=code)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def choose_file(self, selector: str, path):
        """What the dialog of a file input would do."""
        node = self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")
        self.call("DOM.setFileInputFiles", files=[str(path)], objectId=node["result"]["objectId"])

    def resize(self, width: int, height: int, scheme: str = "light"):
        """The size of the window, and whether dark colors are preferred."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=False)
        self.call("Emulation.setScrollbarsHidden", hidden=True)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path):
        picture = self.call("Page.captureScreenshot")["data"]
        Path(path).write_bytes(base64.b64decode(picture))

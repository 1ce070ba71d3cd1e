//! A headless Chromium, driven over a pipe by its own protocol (Chrome DevTools Protocol): JSON, a zero byte after each.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "it is part of tests")]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// For one answer of the browser.
const PATIENCE: Duration = Duration::from_secs(30);

/// The browser's program: the variable CHROMIUM, or one of the usual names.
pub fn find() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("CHROMIUM").map(PathBuf::from) {
        return Some(path);
    }
    let folders = std::env::var_os("PATH")?;
    let names = ["chromium", "chromium-browser", "google-chrome"];
    std::env::split_paths(&folders)
        .flat_map(|folder| names.map(|name| folder.join(name)))
        .find(|path| path.is_file())
}

/// A browser with an empty profile.
pub struct Browser {
    child: Child,
    pipe: ChildStdin,
    messages: Receiver<Value>,
    next: u64,
    _profile: tempfile::TempDir,
}

impl Browser {
    pub fn start(program: &Path) -> Self {
        let profile = tempfile::tempdir().unwrap();
        // It reads from descriptor 3 and writes to 4.
        let script = "exec \"$0\" \"$@\" 3<&0 4>&1 0</dev/null 1>/dev/null 2>/dev/null";
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(program).args([
            "--headless=new",
            "--remote-debugging-pipe",
            // Tests run as root in containers, where Chromium's own sandbox can't.
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--hide-scrollbars",
        ]);
        command.arg(format!("--user-data-dir={}", profile.path().display())).arg("about:blank");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let pipe = child.stdin.take().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let (sender, messages) = channel();
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            while output.read_until(0, &mut bytes).is_ok_and(|n| n > 0) {
                if sender.send(serde_json::from_slice(&bytes[..bytes.len() - 1]).unwrap()).is_err() {
                    return;
                }
                bytes.clear();
            }
        });
        Self { child, pipe, messages, next: 0, _profile: profile }
    }

    fn call(&mut self, session: Option<&str>, method: &str, params: Value) -> Value {
        self.next += 1;
        let mut message = json!({ "id": self.next, "method": method, "params": params });
        if let Some(session) = session {
            message["sessionId"] = session.into();
        }
        let mut bytes = message.to_string().into_bytes();
        bytes.push(0);
        self.pipe.write_all(&bytes).unwrap();
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let answer = self.messages.recv_timeout(left);
            let answer = answer.unwrap_or_else(|_| panic!("no answer of the browser to {method}"));
            if answer["id"] == self.next {
                assert!(answer["error"].is_null(), "{method}: {}", answer["error"]);
                return answer["result"].clone();
            }
        }
    }

    /// A tab at an address.
    pub fn open(&mut self, url: &str) -> Tab {
        let target = self.call(None, "Target.createTarget", json!({ "url": url }))["targetId"].clone();
        let params = json!({ "targetId": target, "flatten": true });
        let session =
            self.call(None, "Target.attachToTarget", params)["sessionId"].as_str().unwrap().to_owned();
        Tab { session }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // It may have gone by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One tab.
pub struct Tab {
    session: String,
}

impl Tab {
    pub fn call(&self, browser: &mut Browser, method: &str, params: Value) -> Value {
        browser.call(Some(&self.session), method, params)
    }

    /// The value of an expression, also of one that is awaited.
    pub fn get(&self, browser: &mut Browser, expression: &str) -> Value {
        let params = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let result = self.call(browser, "Runtime.evaluate", params);
        assert!(result["exceptionDetails"].is_null(), "{expression}: {}", result["exceptionDetails"]);
        result["result"]["value"].clone()
    }

    /// Waits until an expression is true.
    pub fn until(&self, browser: &mut Browser, seconds: u64, expression: &str) {
        self.front(browser);
        let end = Instant::now() + Duration::from_secs(seconds);
        while self.get(browser, expression) != true {
            assert!(Instant::now() < end, "not in {seconds} s: {expression}\n{}", self.text(browser));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Others are not drawn.
    pub fn front(&self, browser: &mut Browser) {
        self.call(browser, "Page.bringToFront", json!({}));
    }

    pub fn text(&self, browser: &mut Browser) -> String {
        self.get(browser, "document.body.innerText").as_str().unwrap_or_default().to_owned()
    }

    /// Width and height in CSS pixels.
    pub fn size(&self, browser: &mut Browser, width: u32, height: u32) {
        let params =
            json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600 });
        self.call(browser, "Emulation.setDeviceMetricsOverride", params);
    }

    /// `light` or `dark`.
    pub fn theme(&self, browser: &mut Browser, theme: &str) {
        let params = json!({ "features": [{ "name": "prefers-color-scheme", "value": theme }] });
        self.call(browser, "Emulation.setEmulatedMedia", params);
    }

    /// Types letters, as from a keyboard.
    pub fn type_text(&self, browser: &mut Browser, text: &str) {
        self.front(browser);
        for letter in text.chars() {
            if letter == '\n' {
                self.press(browser, "Enter");
                continue;
            }
            self.call(
                browser,
                "Input.dispatchKeyEvent",
                json!({ "type": "char", "text": letter.to_string() }),
            );
        }
    }

    /// Presses a key with a name, as `Enter` or `ArrowRight`.
    pub fn press(&self, browser: &mut Browser, key: &str) {
        let code = match key {
            "Enter" => 13,
            "Escape" => 27,
            "ArrowLeft" => 37,
            "ArrowUp" => 38,
            "ArrowRight" => 39,
            "ArrowDown" => 40,
            _ => 0,
        };
        let text = if key == "Enter" { "\r" } else { "" };
        for kind in ["keyDown", "keyUp"] {
            let mut params = json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code });
            if kind == "keyDown" && !text.is_empty() {
                params["text"] = text.into();
            }
            self.call(browser, "Input.dispatchKeyEvent", params);
        }
    }

    /// Clicks at a point.
    pub fn click(&self, browser: &mut Browser, x: f64, y: f64) {
        for kind in ["mousePressed", "mouseReleased"] {
            let params = json!({ "type": kind, "x": x, "y": y, "button": "left", "clickCount": 1 });
            self.call(browser, "Input.dispatchMouseEvent", params);
        }
    }

    /// Keeps what the tab shows.
    pub fn screenshot(&self, browser: &mut Browser, file: &Path) {
        let data = self.call(browser, "Page.captureScreenshot", json!({ "format": "png" }));
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, base64(data["data"].as_str().unwrap())).unwrap();
    }
}

/// Decodes base64.
fn base64(text: &str) -> Vec<u8> {
    let value = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let digits: Vec<u8> = text.bytes().filter(|c| *c != b'=').map(value).collect();
    let mut bytes = Vec::with_capacity(digits.len() * 3 / 4);
    for group in digits.chunks(4) {
        let word =
            group.iter().fold(0u32, |word, digit| word << 6 | u32::from(*digit)) << (6 * (4 - group.len()));
        bytes.extend(&word.to_be_bytes()[1..group.len()]);
    }
    bytes
}

//! The page in a real browser. Screenshots go to out/screenshots/.
#![allow(clippy::unwrap_used, reason = "these are tests, helpers included")]

#[path = "common/asm.rs"]
#[allow(dead_code)]
mod asm;
mod browser;
#[path = "support/image.rs"]
mod image;
#[path = "support/program.rs"]
#[allow(dead_code)]
mod program;
mod web_support;

use std::path::{Path, PathBuf};

use browser::{Browser, Tab};
use program::{Behaviour, write_image};
use web_support::{Lab, until};

/// None, after saying why, if there is no browser.
fn browser(test: &str) -> Option<Browser> {
    match browser::find() {
        Some(program) => {
            println!("{test}: screenshots in out/screenshots");
            Some(Browser::start(&program))
        }
        None => {
            println!("SKIPPED: {test}: no Chromium was found; apt-get install chromium, or set CHROMIUM");
            None
        }
    }
}

fn screenshot(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../out/screenshots").join(name)
}

/// A tab of that size and theme.
fn tab(browser: &mut Browser, url: &str, (width, height): (u32, u32), theme: &str) -> Tab {
    let tab = browser.open("about:blank");
    tab.size(browser, width, height);
    tab.theme(browser, theme);
    tab.call(browser, "Page.navigate", serde_json::json!({ "url": url }));
    tab
}

const DESK: (u32, u32) = (1280, 800);
const PHONE: (u32, u32) = (390, 844);
const LIVE: &str = "document.getElementById('link')?.dataset.link === 'live'";
const ATTACHED: &str = "document.getElementById('terminal')?.dataset.link === 'open'";

fn shows(id: &str, text: &str) -> String {
    format!("document.getElementById('{id}')?.innerText.includes({text:?})")
}

fn count(state: &str, vms: u32) -> String {
    format!(
        "document.querySelector('.states [data-state={state}]').innerText.replace(/\\u202f/g, '') === '{state} {vms}'"
    )
}

fn drawn(vms: u32) -> String {
    format!("document.getElementById('grid').dataset.vms === '{vms}'")
}

fn no_wider_than_the_screen(browser: &mut Browser, tab: &Tab) {
    tab.until(browser, 5, "document.documentElement.scrollWidth <= innerWidth");
}

#[test]
fn a_grid_of_256_a_console_a_failure_and_a_restart() {
    const VMS: u32 = 256;
    let Some(mut browser) = browser("the page with 256 VMs") else { return };
    let browser = &mut browser;
    let lab = Lab::new(|folder| write_image(folder, Behaviour::default()));
    let fleet = lab.serve(VMS, &["--net", "off"]);
    lab.until_ready(VMS);
    let url = format!("http://127.0.0.1:{}/", lab.port);

    // The grid: all VMs, counted, by keyboard, by number, by state.
    let page = tab(browser, &url, DESK, "light");
    page.until(browser, 20, LIVE);
    page.until(browser, 10, &drawn(VMS));
    page.until(browser, 10, &count("idle", VMS));
    page.until(browser, 5, "document.querySelector('[data-plot=ready] b').innerText === '256'");
    page.screenshot(browser, &screenshot("grid-256-light.png"));
    page.theme(browser, "dark");
    page.until(browser, 5, "getComputedStyle(document.body).backgroundColor === 'rgb(14, 20, 22)'");
    page.screenshot(browser, &screenshot("grid-256-dark.png"));
    page.get(browser, "document.getElementById('grid').focus()");
    for key in ["ArrowRight", "ArrowRight", "ArrowDown", "ArrowUp", "ArrowRight"] {
        page.press(browser, key);
    }
    page.until(browser, 5, &shows("here", "VM 3: idle"));
    page.type_text(browser, "/");
    page.press(browser, "/");
    page.get(browser, "document.getElementById('search').focus()");
    page.type_text(browser, "25");
    page.until(browser, 5, &drawn(7)); // 25 and 250 to 255
    page.press(browser, "Escape");
    page.until(browser, 5, &drawn(VMS));

    // Pause, resume.
    page.get(browser, "location.hash = '#/vm/7'");
    page.until(browser, 10, &shows("vm-state", "idle"));
    page.get(browser, "document.querySelector('[data-act=pause]').click()");
    page.until(browser, 10, &shows("vm-state", "paused"));
    assert_eq!(lab.state(7), "paused");
    page.get(browser, "document.querySelector('[data-act=resume]').click()");
    page.until(browser, 10, &shows("vm-state", "idle"));
    let phone = tab(browser, &format!("{url}#/vm/7"), PHONE, "dark");
    phone.until(browser, 10, &shows("vm-state", "idle"));
    no_wider_than_the_screen(browser, &phone);
    phone.until(
        browser,
        5,
        "[...document.querySelectorAll('.panel:not([hidden])')].every(p => p.offsetWidth > 340)",
    );
    phone.screenshot(browser, &screenshot("vm-phone-dark.png"));
    phone.get(browser, "location.hash = '#/'");
    phone.until(browser, 10, &drawn(VMS));
    no_wider_than_the_screen(browser, &phone);
    phone.screenshot(browser, &screenshot("grid-256-phone-dark.png"));

    if lab.get("/api/fleet")["facts"]["terminal"] == true {
        typing(browser, &lab, &page, &url);
    } else {
        println!("SKIPPED: typing on the page: this build has no terminal; cargo xtask test gets it");
    }

    // A fleet that goes away and comes back at the same address.
    page.get(browser, "location.hash = '#/'");
    drop(fleet);
    page.until(browser, 20, "document.getElementById('link').dataset.link === 'lost'");
    page.until(browser, 5, "!document.getElementById('lost').hidden");
    page.screenshot(browser, &screenshot("connection-lost.png"));
    let _fleet = lab.serve(64, &["--net", "off"]);
    page.until(browser, 20, LIVE);
    page.until(browser, 20, &drawn(64));
    page.until(browser, 20, &count("idle", 64));
    page.until(browser, 5, "document.getElementById('lost').hidden");
}

/// The console of VM 5: two tabs, a failure on purpose, a reset.
fn typing(browser: &mut Browser, lab: &Lab, page: &Tab, url: &str) {
    let prints = |text: &str| format!("document.querySelector('.xterm-rows')?.innerText.includes({text:?})");
    page.get(browser, "location.hash = '#/vm/5'");
    page.until(browser, 10, ATTACHED);
    page.until(browser, 10, &prints("READY 0005"));
    let second = tab(browser, &format!("{url}#/vm/5"), DESK, "light");
    second.until(browser, 10, ATTACHED);
    page.get(browser, "document.querySelector('.xterm-helper-textarea').focus()");
    page.type_text(browser, "typed here");
    page.until(browser, 10, &prints("typed here"));
    second.until(browser, 10, &prints("typed here"));
    page.screenshot(browser, &screenshot("console-dark.png"));

    // Ctrl-P makes this guest panic.
    page.get(browser, "document.querySelector('.xterm-helper-textarea').focus()");
    let key = |kind: &str| serde_json::json!({ "type": kind, "modifiers": 2, "key": "p", "code": "KeyP", "windowsVirtualKeyCode": 80 });
    page.call(browser, "Input.dispatchKeyEvent", key("keyDown"));
    page.call(browser, "Input.dispatchKeyEvent", key("keyUp"));
    page.until(browser, 10, &shows("vm-state", "failed"));
    page.until(browser, 10, &shows("vm-note", "as you wish"));
    page.screenshot(browser, &screenshot("vm-failed-dark.png"));
    // Escape is the guest's, Ctrl-] is not.
    page.press(browser, "Escape");
    assert_eq!(page.get(browser, "location.hash"), "#/vm/5");
    let leave = serde_json::json!({
        "type": "keyDown", "modifiers": 2, "key": "]", "code": "BracketRight", "windowsVirtualKeyCode": 221
    });
    page.call(browser, "Input.dispatchKeyEvent", leave);
    page.until(browser, 5, "document.activeElement.id === 'back'");
    page.get(browser, "location.hash = '#/'");
    page.until(browser, 10, &count("failed", 1));
    page.screenshot(browser, &screenshot("grid-one-failed-dark.png"));
    page.get(browser, "document.querySelector('.states [data-state=failed]').click()");
    page.until(browser, 5, &drawn(1));
    page.get(browser, "document.querySelector('.states [data-state=failed]').click()");
    page.until(browser, 5, &drawn(256));
    assert_eq!(lab.get("/api/vms?state=failed")[0]["vm"], 5);

    // A reset brings it back, and both terminals.
    page.get(browser, "location.hash = '#/vm/5'");
    page.until(browser, 10, "!document.querySelector('[data-act=reset]').disabled");
    page.get(browser, "document.querySelector('[data-act=reset]').click()");
    page.until(browser, 2, "document.querySelector('[data-act=reset]').innerText === 'Really reset?'");
    assert_eq!(lab.get("/api/vms/5")["reboots"], 0, "one press is not enough");
    page.get(browser, "document.querySelector('[data-act=reset]').click()");
    page.until(browser, 10, &shows("vm-state", "idle"));
    page.until(browser, 10, ATTACHED);
    second.until(browser, 10, ATTACHED);
    page.get(browser, "document.querySelector('.xterm-helper-textarea').focus()");
    page.type_text(browser, "again");
    second.until(browser, 10, &prints("again"));
    assert_eq!(lab.get("/api/vms/5")["reboots"], 1);
}

#[test]
fn a_grid_of_4096_draws_fast() {
    const VMS: u32 = 4096;
    let Some(mut browser) = browser("the page with 4,096 VMs") else { return };
    let browser = &mut browser;
    let lab = Lab::new(|folder| write_image(folder, Behaviour::default()));
    let _fleet = lab.serve(VMS, &["--net", "off"]);
    lab.until_ready(VMS);
    let page = tab(browser, &format!("http://127.0.0.1:{}/", lab.port), DESK, "dark");
    page.until(browser, 20, LIVE);
    page.until(browser, 30, &count("idle", VMS));
    page.until(browser, 10, "document.getElementById('grid').dataset.drawn === '4096'");
    page.screenshot(browser, &screenshot("grid-4096-dark.png"));
    // All of them, then the largest tiles while scrolling: none may take longer than a few frames.
    for zoom in [0, 7] {
        page.get(
            browser,
            &format!(
                "{{ const z = document.getElementById('zoom'); z.value = {zoom}; z.dispatchEvent(new Event('input')) }}"
            ),
        );
        let slowest = page.get(
            browser,
            "(async () => { const grid = document.getElementById('grid'); const times = [];
               for (let i = 0; i < 40; i++) { grid.scrollTop += 97; grid.dispatchEvent(new Event('scroll'));
                 await new Promise(requestAnimationFrame); await new Promise(requestAnimationFrame);
                 times.push(+grid.dataset.millis) }
               return times.sort((a, b) => a - b)[20] })()",
        );
        let millis = slowest.as_f64().unwrap();
        println!("a grid of 4,096, zoom {zoom}: {millis} ms for a frame, median of 40");
        assert!(millis < 50.0, "{millis} ms for a frame");
    }
}

/// What a hostile page of a guest tries; it tells its parent what came of it. Lines that a guest's shell can take.
const HOSTILE: [&str; 10] = [
    r#"<script>const told = {};"#,
    r#"const attempt = async (what, act) => { try { told[what] = await act() } catch { told[what] = "kept out" } };"#,
    r#"(async () => {"#,
    r#"await attempt("parent", () => parent.document.title);"#,
    r#"await attempt("storage", () => String(localStorage.length));"#,
    r#"await attempt("reset", () => fetch("/api/vms/1/reset", { method: "POST", mode: "no-cors" }));"#,
    r#"await attempt("live", () => new Promise((yes, no) => { const s = new WebSocket("ws://" + location.host +"#,
    r#" "/api/live"); s.onmessage = yes; s.onerror = no }));"#,
    r#"await attempt("top", () => { top.location = "about:blank" });"#,
    r#"parent.postMessage(told, "*") })()</script>"#,
];

#[test]
fn a_real_fleet_with_its_pages() {
    const VMS: u32 = 24;
    let Some(image) = std::env::var_os("GUEST_IMAGE").map(PathBuf::from) else {
        println!("SKIPPED: a real fleet on the page: GUEST_IMAGE names no image; cargo xtask test sets it");
        return;
    };
    let Some(mut browser) = browser("a real fleet on the page") else { return };
    let browser = &mut browser;
    let lab = Lab::of(image);
    let _fleet = lab.serve(VMS, &[]);
    lab.until_ready(VMS);
    let url = format!("http://127.0.0.1:{}/", lab.port);
    let page = tab(browser, &url, DESK, "dark");
    page.until(browser, 20, LIVE);
    // The grid fetches every VM's page, which tells the uptime.
    until("all pages are fetched", || {
        let vms = lab.get("/api/vms");
        vms.as_array().unwrap().iter().all(|vm| vm["uptime"].is_u64())
    });
    std::thread::sleep(std::time::Duration::from_secs(3));
    page.screenshot(browser, &screenshot("fleet-dark.png"));
    let phone = tab(browser, &format!("{url}#/vm/3"), PHONE, "light");
    phone.until(browser, 10, &shows("page-hint", "ms"));
    no_wider_than_the_screen(browser, &phone);
    phone.until(browser, 5, "[...document.querySelectorAll('.panel')].every(p => p.offsetWidth > 340)");
    phone.screenshot(browser, &screenshot("vm-phone-light.png"));
    let light = tab(browser, &format!("{url}#/vm/3"), DESK, "light");
    light.until(browser, 10, &shows("page-hint", "ms"));

    // A capture, while the grid fetches pages.
    let capture = lab.bytes("GET /api/vms/3/pcap?seconds=3");
    assert_eq!(capture[..4], [0x0a, 0x0d, 0x0d, 0x0a], "a section header of pcapng");
    assert!(capture.windows(14).any(|bytes| bytes == b"GET / HTTP/1.0"), "{} bytes", capture.len());
    let link = lab.ask("GET /api/vms/3/link", &[]).body;
    assert!(link.contains("rx_packets"), "{link}");

    // The VM's page is there, in its sandbox.
    let answer = lab.ask("GET /vm/3/", &[]);
    assert_eq!(answer.status, 200);
    assert!(answer.body.contains("VM 3") && answer.head.contains("sandbox"), "{}", answer.head);
    assert_eq!(lab.ask("GET /vm/3/none", &[]).status, 404);
    assert_eq!(
        light.get(browser, "document.getElementById('page').contentDocument"),
        serde_json::Value::Null
    );

    if lab.get("/api/fleet")["facts"]["terminal"] != true {
        println!("SKIPPED: typing into a real guest: this build has no terminal; cargo xtask test gets it");
        return;
    }
    light.until(browser, 10, ATTACHED);
    light.get(browser, "document.querySelector('.xterm-helper-textarea').focus()");
    light.type_text(browser, "echo $((6*7)) is the answer");
    light.press(browser, "Enter");
    light.until(browser, 20, "document.querySelector('.xterm-rows').innerText.includes('42 is the answer')");
    light.screenshot(browser, &screenshot("vm-light.png"));

    // A guest's page can't script ours.
    assert!(lab.command("pause", &["2"]).output().unwrap().status.success());
    for line in HOSTILE {
        light.type_text(browser, &format!("echo '{line}' >> /var/www/evil.html\n"));
    }
    until("the hostile page is there", || lab.ask("GET /vm/3/evil.html", &[]).body.contains("</script>"));
    light.get(
        browser,
        "window.told = null; addEventListener('message', (e) => { window.told = e.data }); \
         document.getElementById('page').src = '/vm/3/evil.html'",
    );
    light.until(browser, 20, "window.told !== null");
    let told = light.get(browser, "window.told");
    for what in ["parent", "storage", "reset", "live", "top"] {
        assert_eq!(told[what], "kept out", "{told}");
    }
    assert_eq!(lab.get("/api/vms/1")["reboots"], 0);
    light.until(browser, 5, &shows("vm-name", "VM 3"));
}

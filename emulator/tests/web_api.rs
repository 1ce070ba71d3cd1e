//! The JSON API, the metrics, and who is kept out, over plain HTTP.
#![allow(clippy::unwrap_used, reason = "these are tests, helpers included")]

#[path = "common/asm.rs"]
#[allow(dead_code)]
mod asm;
#[path = "support/image.rs"]
mod image;
#[path = "support/program.rs"]
#[allow(dead_code)]
mod program;
mod web_support;

use std::net::TcpListener;

use program::{Behaviour, write_image};
use web_support::{Lab, until};

fn lab() -> Lab {
    Lab::new(|folder| write_image(folder, Behaviour::default()))
}

#[test]
fn vms_are_told_paused_resumed_and_reset() {
    let lab = lab();
    let _fleet = lab.serve(12, &["--net", "off"]);
    lab.until_ready(12);
    let fleet = lab.get("/api/fleet");
    assert_eq!(fleet["facts"]["vms"], 12);
    until("a look at all VMs", || lab.get("/api/fleet")["totals"]["states"]["idle"] == 12);
    assert_eq!(lab.get("/api/vms?vms=2-4,9").as_array().unwrap().len(), 4);
    assert_eq!(lab.get("/api/vms?state=failed").as_array().unwrap().len(), 0);

    let vm = lab.get("/api/vms/3");
    assert_eq!((vm["vm"].as_u64(), vm["state"].as_str()), (Some(3), Some("idle")));
    assert_eq!(vm["console"][1], "READY 0003");
    assert!(vm["instructions"].as_u64().unwrap() > 100 && vm["page"].is_null(), "{vm}");

    assert_eq!(lab.ask("POST /api/vms/3,5-6/pause", &[]).json()["vms"], 3);
    assert_eq!([3, 4, 5, 6].map(|vm| lab.state(vm)), ["paused", "idle", "paused", "paused"]);
    assert_eq!(lab.ask("POST /api/vms/all/resume", &[]).json()["vms"], 12);
    assert_eq!([3, 5].map(|vm| lab.state(vm)), ["idle", "idle"]);

    lab.ask("POST /api/vms/7/pause", &[]);
    lab.ask("POST /api/vms/7/reset", &[]);
    until("the reset VM is ready", || {
        let vm = lab.get("/api/vms/7");
        vm["reboots"] == 1 && vm["state"] == "idle"
    });
    for (request, status) in [
        ("POST /api/vms/12/pause", 404),
        ("POST /api/vms/1/explode", 404),
        ("GET /api/vms/1/pause", 405),
        ("GET /api/vms/-1", 404),
        ("GET /api/vms/99", 404),
        ("GET /api/vms?state=happy", 400),
        ("GET /api/vms?vms=5-1", 400),
        ("GET /assets/../Cargo.toml", 404),
        ("GET /nothing", 404),
    ] {
        let answer = lab.ask(request, &[]);
        assert_eq!(answer.status, status, "{request}: {}", answer.body);
    }
    // The command line uses the same API.
    let act = |action: &str, vms: &str| lab.command(action, &[vms]).output().unwrap();
    assert!(act("pause", "0-1").status.success());
    assert_eq!([0, 1, 2].map(|vm| lab.state(vm)), ["paused", "paused", "idle"]);
    assert!(act("resume", "all").status.success());
    let error = String::from_utf8(act("reset", "99").stderr).unwrap();
    assert!(error.contains("VMs from 0 to 11"), "{error}");
}

#[test]
fn metrics_are_in_prometheus_format() {
    let lab = lab();
    let _fleet = lab.serve(3, &["--net", "off"]);
    lab.until_ready(3);
    until("a look at all VMs", || lab.get("/api/fleet")["totals"]["states"]["idle"] == 3);
    let text = lab.ask("GET /metrics", &[]).body + &lab.ask("GET /metrics/vms", &[]).body;
    let mut kinds = std::collections::HashMap::new();
    for line in text.lines() {
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            assert!(["gauge", "counter"].contains(&kind), "{line}");
            assert!(kinds.insert(name.to_owned(), kind.to_owned()).is_none(), "{line} twice");
        } else if !line.starts_with("# HELP ") {
            let (key, value) = line.rsplit_once(' ').unwrap();
            let name = key.split('{').next().unwrap();
            assert!(kinds.contains_key(name), "{line}: no type");
            assert_eq!(kinds[name] == "counter", name.ends_with("_total"), "{line}");
            assert!(value.parse::<f64>().is_ok(), "{line}");
        }
    }
    for line in ["lg_vms{state=\"idle\"} 3", "lg_vms_ready_total 3", "lg_vm_state{vm=\"2\",state=\"idle\"} 1"]
    {
        assert!(text.contains(line), "{line}\n{text}");
    }
}

#[test]
fn other_sites_and_other_names_are_kept_out() {
    let lab = lab();
    let _fleet = lab.serve(1, &["--net", "off"]);
    let own = format!("Origin: http://127.0.0.1:{}", lab.port);
    let upgrade =
        ["Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: MDEyMzQ1Njc4OTAxMjM0NQ=="];
    for path in ["/api/live", "/api/vms/0/console"] {
        for (origin, status) in
            [("Origin: http://evil.example", 403), ("Origin: null", 403), ("Origin: http://localhost:1", 403)]
        {
            let answer = lab.ask(&format!("GET {path}"), &[&upgrade[..], &[origin]].concat());
            assert_eq!(answer.status, status, "{path} {origin}");
        }
    }
    assert_eq!(lab.ask("POST /api/vms/0/reset", &["Origin: http://evil.example"]).status, 403);
    assert_eq!(lab.ask("POST /api/vms/0/pause", &[&own]).status, 200);
    for path in ["/", "/api/fleet", "/vm/0/", "/metrics"] {
        let answer = lab.ask(&format!("GET {path}"), &["Host: evil.example"]);
        assert_eq!(answer.status, 403, "{path}");
        assert_eq!(lab.send(&format!("GET {path} HTTP/1.0\r\n\r\n")).status, 403, "{path} without a name");
    }
    assert_eq!(lab.ask("GET /api/fleet", &["Sec-Fetch-Site: cross-site"]).status, 403);
    let page = lab.ask("GET /", &[]);
    assert_eq!(page.status, 200);
    assert!(page.head.contains("frame-ancestors 'none'") && page.head.contains("nosniff"), "{}", page.head);
    // Whatever is served for a VM is in the sandbox, an error as well.
    let guest = lab.ask("GET /vm/0/", &[]);
    assert_eq!(guest.status, 404, "{}", guest.body);
    assert!(guest.head.contains("content-security-policy: sandbox"), "{}", guest.head);
    // The raw console is for the control socket alone.
    assert_eq!(lab.ask("GET /api/vms/0/terminal", &["Upgrade: console"]).status, 405);
}

#[test]
fn a_token_is_demanded_where_one_is_set() {
    let lab = lab().token("correct-horse-battery");
    let _fleet = lab.serve(1, &["--net", "off"]);
    for path in ["/", "/api/fleet", "/metrics", "/vm/0/", "/assets/main.js"] {
        assert_eq!(lab.ask(&format!("GET {path}"), &[]).status, 401, "{path}");
    }
    assert_eq!(lab.ask("GET /?token=wrong-horse-battery.", &[]).status, 401);
    assert_eq!(lab.ask("GET /api/fleet", &["Authorization: Bearer correct-horse-battery"]).status, 200);
    let answer = lab.ask("GET /?token=correct-horse-battery", &[]);
    assert_eq!(answer.status, 303);
    let cookie = answer.head.lines().find_map(|line| line.strip_prefix("set-cookie: ")).unwrap();
    assert!(cookie.contains("httponly") && cookie.contains("samesite=strict"), "{cookie}");
    let cookie = format!("Cookie: {}", cookie.split(';').next().unwrap());
    assert_eq!(lab.ask("GET /", &[&cookie]).status, 200);
    // A VM's page in its sandbox has no cookie; the way to it has a ticket instead.
    let moved = lab.ask("GET /vm/0/", &[&cookie]);
    assert_eq!(moved.status, 307);
    let way = moved.head.lines().find_map(|line| line.strip_prefix("location: ")).unwrap().to_owned();
    assert_eq!(lab.ask(&format!("GET {way}style.css"), &[]).status, 404, "let in; there is no bridge");
    assert_eq!(lab.ask(&format!("GET {}", way.replace("/0~", "/1~")), &[]).status, 401);
    // The control socket is this user's own and wants none.
    assert!(lab.command("status", &[]).output().unwrap().status.success());
}

#[test]
fn an_address_that_is_taken_is_an_error() {
    let lab = lab();
    let _taken = TcpListener::bind(("127.0.0.1", lab.port)).unwrap();
    let image = lab.image().display().to_string();
    let output = lab
        .command("fleet", &["--image", &image, "--vms", "1", "--net", "off", "--web", &lab.port.to_string()])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains(&format!("--web 127.0.0.1:{}", lab.port)) && error.contains("in use"), "{error}");
}

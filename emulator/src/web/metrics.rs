//! Metrics in the text format of Prometheus.

use std::fmt::Write;
use std::sync::Arc;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};

use super::Hub;
use super::survey::State as VmState;
use crate::fleet::Counters;
use crate::net::counters::Snapshot;

const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A document under way.
#[derive(Default)]
struct Document(String);

impl Document {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string can't fail.
        let _ = write!(self.0, "# HELP lg_{name} {help}\n# TYPE lg_{name} {kind}\n");
    }

    fn value(&mut self, name: &str, labels: &str, value: impl std::fmt::Display) {
        // As above.
        let _ = writeln!(self.0, "lg_{name}{labels} {value}");
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: impl std::fmt::Display) {
        self.family(name, kind, help);
        self.value(name, "", value);
    }

    fn answer(self) -> Response {
        ([(CONTENT_TYPE, TEXT)], self.0).into_response()
    }
}

/// `GET /metrics`: the fleet.
pub async fn fleet(State(hub): State<Arc<Hub>>) -> Response {
    let sample = hub.samples.borrow().clone();
    let mut sum = Counters::default();
    hub.fleet.survey(&mut Vec::new(), |glance| sum.add(&glance.counters));
    let memory = hub.fleet.memory();
    let mut text = Document::default();
    text.family("vms", "gauge", "VMs in each state.");
    for state in VmState::ALL {
        let labels = format!("{{state=\"{}\"}}", state.name());
        text.value("vms", &labels, sample.totals.states[state as usize]);
    }
    text.one("vms_ready_total", "counter", "VMs that have been ready.", hub.fleet.been_ready());
    text.one("instructions_total", "counter", "Guest instructions started.", hub.fleet.steps());
    text.family("packets_total", "counter", "Ethernet frames given to (in) and taken from (out) the VMs.");
    text.value("packets_total", "{direction=\"in\"}", sum.rx_frames);
    text.value("packets_total", "{direction=\"out\"}", sum.tx_frames);
    text.one("packets_dropped_total", "counter", "Frames dropped at the VMs' devices.", sum.dropped);
    text.one("reboots_total", "counter", "Times that VMs have started over.", sum.reboots);
    text.family("memory_bytes", "gauge", "Memory of the fleet.");
    for (kind, bytes) in [
        ("shared", memory.shared_bytes),
        ("private", memory.private_bytes),
        ("overhead", memory.overhead_bytes),
    ] {
        text.value("memory_bytes", &format!("{{kind=\"{kind}\"}}"), bytes);
    }
    if let Some(pages) = &hub.pages {
        text.one("pages_fetched_total", "counter", "Pages of VMs that answered 200.", pages.fetched());
    }
    if let Some(watch) = &hub.watch {
        bridge(&mut text, &watch.counters.snapshot());
    }
    text.one(
        "seconds_total",
        "counter",
        "Seconds since the fleet started.",
        hub.fleet.started().elapsed().as_secs_f64(),
    );
    text.answer()
}

/// What passes between the VMs' links and the host.
fn bridge(text: &mut Document, counters: &Snapshot) {
    text.family(
        "bridge_bytes_total",
        "counter",
        "Bytes of the frames that the bridge gave to and took from VMs.",
    );
    text.value("bridge_bytes_total", "{direction=\"in\"}", counters.bytes_in);
    text.value("bridge_bytes_total", "{direction=\"out\"}", counters.bytes_out);
    text.family("bridge_dropped_total", "counter", "Packets that the bridge has dropped, by reason.");
    for (reason, count) in counters.drops() {
        text.value("bridge_dropped_total", &format!("{{reason=\"{}\"}}", reason.name()), count);
    }
    text.one("connections_open", "gauge", "Connections to VMs that are open.", counters.connections_open);
    text.family("connections_total", "counter", "Connections to VMs: all, and how some of them ended.");
    for (end, count) in [
        ("accepted", counters.connections_total),
        ("refused", counters.connections_refused),
        ("timed_out", counters.connections_timed_out),
        ("reset", counters.connections_reset),
    ] {
        text.value("connections_total", &format!("{{what=\"{end}\"}}"), count);
    }
}

/// `GET /metrics/vms`: each VM.
pub async fn vms(State(hub): State<Arc<Hub>>) -> Response {
    let sample = hub.samples.borrow().clone();
    let mut vms = Vec::with_capacity(sample.rows.len());
    hub.fleet.survey(&mut Vec::new(), |glance| vms.push(glance.counters));
    let mut text = Document::default();
    text.family("vm_state", "gauge", "1 for the state that the VM is in.");
    for (vm, row) in sample.rows.iter().enumerate() {
        text.value("vm_state", &format!("{{vm=\"{vm}\",state=\"{}\"}}", row.state.name()), 1);
    }
    type Field = fn(&Counters) -> u64;
    let fields: [(&str, &str, Field); 5] = [
        ("vm_instructions_total", "Instructions retired.", |c| c.instructions),
        ("vm_packets_in_total", "Frames given to the VM.", |c| c.rx_frames),
        ("vm_packets_out_total", "Frames taken from the VM.", |c| c.tx_frames),
        ("vm_packets_dropped_total", "Frames dropped at its device.", |c| c.dropped),
        ("vm_reboots_total", "Times it has started over.", |c| c.reboots),
    ];
    for (name, help, field) in fields {
        text.family(name, "counter", help);
        for (vm, counters) in vms.iter().enumerate() {
            text.value(name, &format!("{{vm=\"{vm}\"}}"), field(counters));
        }
    }
    text.family("vm_uptime_seconds", "gauge", "What the VM's own page says of its uptime.");
    for (vm, row) in sample.rows.iter().enumerate() {
        if let Some(uptime) = row.page.uptime {
            text.value("vm_uptime_seconds", &format!("{{vm=\"{vm}\"}}"), uptime);
        }
    }
    text.answer()
}

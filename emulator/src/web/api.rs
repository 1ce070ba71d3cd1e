//! The JSON API. docs/web.md describes it.

use std::ops::RangeInclusive;
use std::sync::Arc;

use axum::extract::{Path, RawQuery, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};

use super::Hub;
use super::error::{error, no_such_vm};
use super::live::last_line;
use super::pages::PageStatus;
use super::survey::{Sample, State as VmState};
use crate::net::address::{ip_of, mac_of};
use crate::net::record::Direction;

fn answer(value: &impl Serialize) -> Response {
    // Plain numbers, strings and lists always have a JSON form.
    let text = serde_json::to_string(value).unwrap_or_default() + "\n";
    ([(CONTENT_TYPE, "application/json")], text).into_response()
}

/// `GET /api/fleet`
pub async fn fleet(State(hub): State<Arc<Hub>>) -> Response {
    let sample = hub.samples.borrow().clone();
    answer(&json!({ "facts": hub.facts, "totals": named(&sample) }))
}

/// Totals, with states by their names.
fn named(sample: &Sample) -> Value {
    let mut totals = json!(sample.totals);
    let states = VmState::ALL.iter().map(|state| (state.name(), sample.totals.states[*state as usize]));
    totals["states"] = json!(states.collect::<std::collections::BTreeMap<_, _>>());
    totals
}

/// `GET /api/status`
pub async fn status(State(hub): State<Arc<Hub>>) -> Response {
    ([(CONTENT_TYPE, "application/json")], (hub.status)(None)).into_response()
}

/// `GET /api/vms?vms=0-99,200&state=failed`
pub async fn vms(State(hub): State<Arc<Hub>>, RawQuery(query): RawQuery) -> Response {
    let mut ranges = vec![0..=hub.facts.vms.saturating_sub(1)];
    let mut state = None;
    for pair in query.as_deref().unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some(("vms", list)) => match select(list, hub.facts.vms) {
                Ok(list) => ranges = list,
                Err(why) => return error(StatusCode::BAD_REQUEST, why),
            },
            Some(("state", name)) => match VmState::ALL.iter().find(|state| state.name() == name) {
                Some(known) => state = Some(*known),
                None => {
                    let names = VmState::ALL.map(VmState::name).join(", ");
                    return error(StatusCode::BAD_REQUEST, format_args!("a state is one of {names}"));
                }
            },
            _ => {
                let why = format!("{pair}: expected vms=0-9,20 or state=NAME");
                return error(StatusCode::BAD_REQUEST, why);
            }
        }
    }
    let sample = hub.samples.borrow().clone();
    let rows = ranges.into_iter().flatten().filter_map(|vm| Some((vm, sample.rows.get(vm as usize)?)));
    let rows = rows.filter(|(_, row)| state.is_none_or(|state| row.state == state)).map(|(vm, row)| {
        json!({
            "vm": vm,
            "state": row.state,
            "mips": f64::from(row.kips) / 1e3,
            "packets": row.packets,
            "uptime": row.page.uptime,
        })
    });
    answer(&rows.collect::<Vec<Value>>())
}

/// `GET /api/vms/3`
pub async fn vm(State(hub): State<Arc<Hub>>, Path(text): Path<String>) -> Response {
    let Some(vm) = hub.vm(&text) else { return no_such_vm(&hub, &text) };
    let status = hub.fleet.status(vm);
    let row = hub.samples.borrow().rows.get(vm as usize).copied().unwrap_or_default();
    let state = match VmState::of(status.life.stage(), status.activity, 0) {
        // What it did in the last second is known from the last look at all.
        VmState::Idle if row.state == VmState::Ready => VmState::Ready,
        state => state,
    };
    let [cause, epc, tval] = status.last_trap;
    let hex = |word: u32| format!("{word:#010x}");
    let counters = &status.counters;
    let page = hub.pages.as_ref().map(|pages| {
        let page = pages.state(vm);
        json!({
            "url": format!("/vm/{vm}/"),
            "port": pages.reach().port_of(vm),
            "answers": match page.status {
                PageStatus::Unknown => None,
                status => Some(status == PageStatus::Answers),
            },
            "milliseconds": (page.status != PageStatus::Unknown).then_some(page.millis),
            "uptime": page.uptime,
        })
    });
    // Both ways together; the link's own document has them apart.
    let link = hub.watch.as_ref().and_then(|watch| watch.counters.vm(vm));
    let dropped = link.map(|link| {
        let mut sum = std::collections::BTreeMap::<&str, u64>::new();
        for (reason, count) in [Direction::In, Direction::Out].into_iter().flat_map(|way| link.drops(way)) {
            *sum.entry(reason.name()).or_default() += count;
        }
        sum
    });
    let mac = mac_of(vm).map(|mac| mac.map(|byte| format!("{byte:02x}")).join(":")).ok();
    answer(&json!({
        "vm": vm,
        "state": state,
        "reason": status.life.is_down().then(|| status.reason()),
        "mips": f64::from(row.kips) / 1e3,
        "ready": status.ready.map(|ready| json!({
            "seconds": ready.after.as_secs_f64(),
            "instructions": ready.instructions,
        })),
        "instructions": counters.instructions,
        "private_bytes": status.private_bytes,
        "packets_in": counters.rx_frames,
        "packets_out": counters.tx_frames,
        "packets_dropped": counters.dropped,
        "bridge_dropped": dropped,
        "reboots": counters.reboots,
        "pc": hex(status.pc),
        // At its first instruction a VM has all of them zero.
        "last_trap": (status.last_trap != [0; 3]).then(|| json!({
            "cause": cause, "name": cause_name(cause), "epc": hex(epc), "tval": hex(tval),
        })),
        "ip": ip_of(vm).ok(),
        "mac": mac,
        "page": page,
        "last_line": last_line(&hub, vm),
        "console": hub.fleet.last_lines(vm),
    }))
}

/// `GET /api/vms/3/link`
pub async fn link(State(hub): State<Arc<Hub>>, Path(text): Path<String>) -> Response {
    match hub.vm(&text) {
        Some(vm) => (hub.status)(Some(vm)).into_response(),
        None => no_such_vm(&hub, &text),
    }
}

/// `POST /api/vms/3/pause`, `resume`, `reset`; also `0-9,20` and `all` of them.
pub async fn act(State(hub): State<Arc<Hub>>, Path((list, action)): Path<(String, String)>) -> Response {
    let ranges = match select(&list, hub.facts.vms) {
        Ok(ranges) => ranges,
        Err(why) => return error(StatusCode::NOT_FOUND, why),
    };
    let act = match &action[..] {
        "pause" => crate::fleet::Fleet::pause,
        "resume" => crate::fleet::Fleet::resume,
        "reset" => crate::fleet::Fleet::reset,
        _ => {
            let why = format!("{action}: expected pause, resume or reset");
            return error(StatusCode::NOT_FOUND, why);
        }
    };
    let mut count = 0u32;
    for vm in ranges.into_iter().flatten() {
        act(&hub.fleet, vm);
        count += 1;
    }
    answer(&json!({ "vms": count }))
}

/// `all`, or numbers and ranges as in `0-9,20`. Ranges don't overlap, so that nobody is meant twice.
pub fn select(list: &str, vms: u32) -> Result<Vec<RangeInclusive<u32>>, String> {
    let last = vms.saturating_sub(1);
    if list == "all" {
        return Ok(vec![0..=last]);
    }
    let mut ranges = Vec::new();
    for part in list.split(',') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            digits.then(|| text.parse::<u32>().ok()).flatten().filter(|vm| *vm <= last)
        };
        match (number(from), number(to)) {
            (Some(from), Some(to)) if from <= to => ranges.push(from..=to),
            _ => return Err(format!("{part}: expected all, or VMs from 0 to {last} as in 0-9,20")),
        }
    }
    ranges.sort_by_key(|range| *range.start());
    match ranges.windows(2).find(|pair| pair[0].end() >= pair[1].start()) {
        Some(pair) => Err(format!("VM {} is named twice", pair[1].start())),
        None => Ok(ranges),
    }
}

/// The trap causes of RISC-V Privileged, table 4.2.
fn cause_name(cause: u32) -> &'static str {
    match cause {
        0 => "instruction address misaligned",
        1 => "instruction access fault",
        2 => "illegal instruction",
        3 => "breakpoint",
        4 => "load address misaligned",
        5 => "load access fault",
        6 => "store address misaligned",
        7 => "store access fault",
        8 => "system call",
        9 => "supervisor call",
        12 => "instruction page fault",
        13 => "load page fault",
        15 => "store page fault",
        0x8000_0001 => "software interrupt",
        0x8000_0005 => "timer interrupt",
        0x8000_0009 => "external interrupt",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selections() {
        assert_eq!(select("all", 4), Ok(vec![0..=3]));
        assert_eq!(select("3", 4), Ok(vec![3..=3]));
        assert_eq!(select("2,0-1", 4), Ok(vec![0..=1, 2..=2]));
        for bad in ["", "4", "-1", "1-", "2-1", "0,0", "0-2,1", "+1", "a", "0-9999999999", "all,1"] {
            assert!(select(bad, 4).is_err(), "{bad}");
        }
    }
}

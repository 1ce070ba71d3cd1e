//! The manifest: what an image is made of, where its parts are loaded, and one hash over all of it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::error::Error;
use super::profile::{BuilderName, Net, Profile, Ram, Time};
use super::tree::sha256;

/// The manifest's format. Raised when a key changes its meaning.
pub const SCHEMA: u32 = 1;

/// manifest.json. The keys are documented in docs/guest.md.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The format.
    pub schema: u32,
    /// Over everything below: two images with the same hash are the same.
    pub hash: String,
    /// The profile's name.
    pub profile: String,
    /// Its description.
    pub description: String,
    /// Who made kernel and programs.
    pub builder: BuilderName,
    /// The kernel's command line.
    pub bootargs: String,
    /// What a fleet of it does where the command line says nothing.
    pub defaults: Defaults,
    /// Where the parts go.
    pub layout: Layout,
    /// The image's own files, by name.
    pub files: BTreeMap<String, FileSum>,
    /// Everything it was made of, sorted by name.
    pub inputs: Vec<Input>,
}

/// What a profile says about a fleet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Defaults {
    /// VMs.
    pub vms: u32,
    /// Guest time.
    pub time: Time,
    /// Network back end.
    pub net: Net,
    /// VMs don't reach one another.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub isolate: bool,
    /// Services of the host that VMs may use, HOST:GUEST.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<String>,
}

/// Physical addresses and sizes, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// RAM of a VM; it starts at 0.
    pub ram_bytes: u64,
    /// The least RAM that the image boots and serves with.
    pub least_ram_bytes: u64,
    /// Where the hart starts.
    pub entry_address: u64,
    /// Where the Image goes.
    pub kernel_address: u64,
    /// What the kernel takes in memory, .bss included.
    pub kernel_memory_bytes: u64,
    /// Where the initrd goes.
    pub initrd_address: u64,
    /// Its length.
    pub initrd_bytes: u64,
    /// Where the device tree goes; a1 at the start.
    pub dtb_address: u64,
    /// Its length.
    pub dtb_bytes: u64,
}

/// Length and hash of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSum {
    /// Length.
    pub bytes: u64,
    /// Hash.
    pub sha256: String,
}

/// One thing that the image was made of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Input {
    /// What it is: a path in the repository, or a package.
    pub name: String,
    /// Its version, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Hash of its bytes.
    pub sha256: String,
}

/// The device tree's place: the last 64 KiB of RAM.
const DTB_ALIGN: u64 = 64 * 1024;
const PAGE: u64 = 4096;

impl Layout {
    /// Places kernel, initrd and device tree in RAM: the Image at 0, the tree at the top, the initrd right below it.
    pub fn new(ram: Ram, kernel_memory_bytes: u64, initrd_bytes: u64, margin: u64) -> Result<Self, Error> {
        let least = Self::least(kernel_memory_bytes, initrd_bytes, margin);
        if ram.0 < least {
            let what = match initrd_bytes > kernel_memory_bytes {
                true => format!("the initrd is too large for {ram} of RAM"),
                false => format!("{ram} of RAM is too small for this image"),
            };
            return Err(Error::plain(
                format!(
                    "{what}: of {} bytes, the kernel takes {kernel_memory_bytes}, the initrd {initrd_bytes} and as \
                     much again while it is unpacked, and what runs then {margin}",
                    ram.0
                ),
                format!(
                    "The least is {}. Give each VM more RAM, or take something out of the image.",
                    Ram(least)
                ),
            ));
        }
        // These cannot fail: the least RAM has room for both.
        let dtb_address = ram.0.saturating_sub(DTB_ALIGN) & !(DTB_ALIGN - 1);
        let initrd_address = dtb_address.saturating_sub(initrd_bytes) & !(PAGE - 1);
        Ok(Self {
            ram_bytes: ram.0,
            least_ram_bytes: least,
            entry_address: 0,
            kernel_address: 0,
            kernel_memory_bytes,
            initrd_address,
            initrd_bytes,
            dtb_address,
            dtb_bytes: 0,
        })
    }

    /// The device tree must fit between its address and the end of RAM.
    pub fn check_dtb(&self) -> Result<(), Error> {
        let room = self.ram_bytes - self.dtb_address;
        if self.dtb_bytes <= room {
            return Ok(());
        }
        Err(Error::plain(
            format!(
                "the device tree has {} bytes, and its place at the end of RAM only {room}",
                self.dtb_bytes
            ),
            "Make the tree smaller.",
        ))
    }

    /// The least RAM: kernel, initrd and its unpacked copy, and what runs then.
    pub fn least(kernel_memory_bytes: u64, initrd_bytes: u64, margin: u64) -> u64 {
        (kernel_memory_bytes + 2 * initrd_bytes + margin).next_multiple_of(DTB_ALIGN)
    }
}

impl FileSum {
    /// Of some bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self { bytes: bytes.len() as u64, sha256: sha256(bytes) }
    }
}

impl Manifest {
    /// Puts a manifest together and hashes it.
    pub fn new(
        profile: &Profile,
        builder: BuilderName,
        layout: Layout,
        files: BTreeMap<String, FileSum>,
        mut inputs: Vec<Input>,
    ) -> Result<Self, Error> {
        inputs.sort();
        inputs.dedup();
        let mut manifest = Self {
            schema: SCHEMA,
            hash: String::new(),
            profile: profile.name.clone(),
            description: profile.description.clone(),
            builder,
            bootargs: profile.bootargs.clone(),
            defaults: Defaults {
                vms: profile.vms,
                time: profile.time,
                net: profile.net,
                isolate: profile.isolate,
                services: profile.services.clone(),
            },
            layout,
            files,
            inputs,
        };
        manifest.hash = sha256(&manifest.to_json()?);
        Ok(manifest)
    }

    /// As the file holds it.
    pub fn to_json(&self) -> Result<Vec<u8>, Error> {
        let mut json = serde_json::to_vec_pretty(self)
            .map_err(|e| Error::plain(format!("the manifest cannot be written: {e}"), "Report this."))?;
        json.push(b'\n');
        Ok(json)
    }
}

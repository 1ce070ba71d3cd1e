use super::*;

#[path = "../../tests/support/image.rs"]
mod image;

use image::{TREE, Tree, kernel, tree};

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        folder.put("Image", &kernel(2 << 20, 3 << 20));
        folder.put("initrd.cpio", &[7; 5000]);
        folder.put("vm.dtb", &tree(&TREE));
        folder.put("manifest.json", br#"{ "hash": "abc", "schema": 1 }"#);
        folder
    }

    fn put(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.0.path().join(name), bytes).unwrap();
    }

    fn load(&self, ram: Option<u64>) -> Result<GuestImage, GuestError> {
        GuestImage::load(self.0.path(), ram)
    }

    fn error(&self, ram: Option<u64>) -> String {
        self.load(ram).unwrap_err().to_string()
    }
}

#[test]
fn a_good_image_is_laid_out_as_its_tree_says() {
    let image = Folder::new().load(None).unwrap();
    assert_eq!((image.ram_bytes, image.initrd_addr), (8 << 20, 0x60_0000));
    assert_eq!(image.dtb_addr, (8 << 20) - 4096);
    assert_eq!(image.manifest_hash, "abc");
    assert_eq!(image.kernel.len(), 2 << 20);
}

#[test]
fn devices_may_stand_on_a_bus_or_not() {
    let folder = Folder::new();
    folder.put("vm.dtb", &tree(&Tree { soc: false, ..TREE }));
    folder.load(None).unwrap();
}

#[test]
fn more_ram_is_told_to_the_guest() {
    let folder = Folder::new();
    let image = folder.load(Some(64 << 20)).unwrap();
    assert_eq!(image.ram_bytes, 64 << 20);
    assert_eq!(dtb::read(&image.dtb).unwrap().ram_bytes, 64 << 20);
    assert_eq!(image.dtb_addr, (64 << 20) - 4096);
}

#[test]
fn too_little_or_odd_ram_is_refused() {
    let folder = Folder::new();
    let error = folder.error(Some(2 << 20));
    assert!(error.contains("at least 3.6 MiB"), "{error}");
    let error = folder.error(Some(6 << 20));
    assert!(error.contains("the initrd lies from 0x600000"), "{error}");
    assert!(folder.error(Some((8 << 20) + 1)).contains("multiple of 4096"));
    assert!(folder.error(Some(4 << 30)).contains("too large"));
}

#[test]
fn the_manifest_places_the_tree_and_knows_the_least_ram() {
    let folder = Folder::new();
    let layout = |dtb: u32| {
        format!(r#"{{ "hash": "h", "layout": {{ "dtb_address": {dtb}, "least_ram_bytes": 7340032 }} }}"#)
    };
    folder.put("manifest.json", layout(0x70_0000).as_bytes());
    assert_eq!(folder.load(None).unwrap().dtb_addr, 0x70_0000);
    assert!(folder.error(Some(6 << 20)).contains("at least 7 MiB"));
    folder.put("manifest.json", layout(0x60_1000).as_bytes());
    let error = folder.error(None);
    assert!(error.contains("the device tree (0x601000") && error.contains("overlaps the initrd"), "{error}");
    folder.put("manifest.json", layout(u32::MAX - 5).as_bytes());
    assert!(folder.error(None).contains("RAM ends at 0x800000"));
}

#[test]
fn parts_that_overlap_are_refused() {
    let folder = Folder::new();
    folder.put("vm.dtb", &tree(&Tree { initrd: [0x2f_f000, 0x2f_f000 + 5000], ..TREE }));
    let error = folder.error(None);
    assert!(error.contains("the initrd (0x2ff000") && error.contains("overlaps the kernel"), "{error}");
    folder.put("vm.dtb", &tree(&Tree { initrd: [0x60_0000, 0x60_0000 + 6000], ..TREE }));
    assert!(folder.error(None).contains("it has 5000 bytes"));
}

#[test]
fn a_tree_for_another_machine_is_refused() {
    let folder = Folder::new();
    folder.put("vm.dtb", &tree(&Tree { uart: 0xF500_0000, ..TREE }));
    let error = folder.error(None);
    assert!(
        error.contains("the address of the serial port is 0xf5000000; the machine has 0xf4000000"),
        "{error}"
    );
    folder.put("vm.dtb", &tree(&Tree { uart_irq: 10, ..TREE }));
    assert!(folder.error(None).contains("the interrupt of the serial port is 10; the machine has 1"));
}

#[test]
fn foreign_and_truncated_kernels_are_named() {
    let folder = Folder::new();
    let mut arm = kernel(4096, 4096);
    arm[56..60].copy_from_slice(b"ARM\x64");
    let mut wide = kernel(4096, 4096);
    wide[8..16].copy_from_slice(&0x20_0000u64.to_le_bytes());
    for (file, word) in [
        (kernel(1 << 20, 3 << 20), "truncated"),
        (kernel(4096, 4096)[..60].to_vec(), "truncated"),
        (Vec::new(), "truncated"),
        (kernel(4096, 64), "header is damaged"),
        (b"\x7fELF\x01\x01\x01".to_vec(), "an ELF file"),
        (b"\x1f\x8b\x08".to_vec(), "gzip data"),
        (arm, "64-bit ARM"),
        (wide, "64-bit RISC-V"),
        (vec![0; 4096], "not a RISC-V kernel Image"),
    ] {
        folder.put("Image", &file);
        let error = folder.error(None);
        assert!(error.contains(word) && error.contains("Image: "), "{error}");
    }
}

#[test]
fn a_damaged_image_folder_is_refused() {
    let folder = Folder::new();
    folder.put("manifest.json", b"{ \"hash\": \n 5 }");
    assert!(folder.error(None).contains("line 2"));
    let sum = hex::encode(Sha256::digest([7; 5000]));
    let manifest = |sum: &str, bytes: usize| {
        format!(
            r#"{{ "hash": "h", "files": {{ "initrd.cpio": {{ "bytes": {bytes}, "sha256": "{sum}" }} }} }}"#
        )
    };
    folder.put("manifest.json", manifest(&sum, 5000).as_bytes());
    folder.load(None).unwrap();
    folder.put("manifest.json", manifest(&sum, 5001).as_bytes());
    assert!(folder.error(None).contains("the manifest says 5001"));
    folder.put("manifest.json", manifest(&"0".repeat(64), 5000).as_bytes());
    assert!(folder.error(None).contains("hash is not the manifest's"));
    std::fs::remove_file(folder.0.path().join("vm.dtb")).unwrap();
    folder.put("manifest.json", b"{ \"hash\": \"\" }");
    assert!(folder.error(None).contains("cargo xtask image"));
}

#[test]
fn a_damaged_tree_is_an_error_not_a_crash() {
    let whole = tree(&TREE);
    for len in 0..whole.len() {
        assert!(dtb::read(&whole[..len]).is_err(), "{len} bytes of {} passed", whole.len());
    }
}

#[test]
fn a_tree_with_wrong_bytes_is_read_or_refused() {
    let whole = tree(&TREE);
    for at in 0..whole.len() {
        for byte in [0, 1, 0x7f, 0xff] {
            let mut blob = whole.clone();
            blob[at] = byte;
            // Either answer will do; it must come.
            drop(dtb::read(&blob));
        }
    }
}

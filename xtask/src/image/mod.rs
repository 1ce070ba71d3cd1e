//! `cargo xtask image`: from a profile to kernel, initrd, device tree and manifest.
//!
//! A builder makes kernel and programs, which takes minutes and is cached by its inputs. All the rest, the overlays,
//! the generated /init, the device tree and the manifest, takes well under a second and is made anew each time, so
//! there is no cache that could be out of date.

pub mod buildroot;
pub mod cache;
pub mod cpio;
pub mod direct;
pub mod dts;
pub mod error;
pub mod fault;
pub mod init;
pub mod kernel_image;
pub mod manifest;
pub mod overlay;
pub mod parts;
pub mod profile;
pub mod request;
pub mod step;
pub mod text;
pub mod tree;
pub mod try_it;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use crate::flags::{ImageArgs, ImageChoice};
use crate::repo;
use cache::{Cache, Files};
use error::Error;
use manifest::{FileSum, Input, Layout, Manifest};
use overlay::{Layers, Overlay};
use parts::{Parts, Wanted};
use profile::{BuilderName, Profile, Ram};
use text::{Located, Source};
use tree::{Kind, Tree, sha256};

/// RAM that the guest needs beyond kernel and initrd: page tables, slabs, nginx, crond and some requests. Measured with
/// 8 requests at a time: lean is without trouble with 1100 KiB and kills a process with 1036, debug takes 1320 KiB.
const RAM_MARGIN: u64 = 1536 * 1024;

/// What a command asks of an image, beside the profile.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// RAM other than the profile's.
    pub ram: Option<Ram>,
    /// A builder other than the profile's.
    pub builder: Option<BuilderName>,
    /// Say nothing unless something is wrong.
    pub quiet: bool,
    /// What was said about Buildroot.
    pub buildroot: buildroot::Options,
    /// Keep to the builder of the image that is there.
    pub keep: bool,
    /// Something to be missing in the guest.
    pub fault: Option<fault::InitFault>,
}

/// An image that is there.
#[derive(Debug)]
#[allow(dead_code, reason = "for the commands that run an image")]
pub struct ImageDir {
    /// The folder with Image, initrd.cpio, vm.dtb and manifest.json. It is never changed, only replaced as a whole.
    pub dir: PathBuf,
    /// The copy in out/.
    pub out: PathBuf,
    /// What manifest.json says.
    pub manifest: Manifest,
    /// The profile that it was made from.
    pub profile: Profile,
    /// Whether anything was made that was not there before.
    pub changed: bool,
}

impl From<&ImageChoice> for Options {
    fn from(choice: &ImageChoice) -> Self {
        Self {
            ram: choice.ram,
            builder: choice.builder.map(Into::into),
            quiet: choice.quiet,
            buildroot: (&choice.buildroot).into(),
            keep: false,
            fault: None,
        }
    }
}

/// `cargo xtask image`.
pub fn command(args: &ImageArgs) -> miette::Result<()> {
    let root = repo::root()?;
    if args.list {
        list(&root)?;
        return Ok(());
    }
    if args.write_defconfigs {
        for path in buildroot::write::write(&root)? {
            say(&format!("written: {}", path.display()));
        }
        if let Some((tree, _)) = buildroot::release::given(args.choice.buildroot.dir.as_deref())? {
            buildroot::write::record(&root, &tree)?;
        }
        return Ok(());
    }
    let start = Instant::now();
    let fault = args.fault.as_deref().map(str::parse::<fault::Fault>).transpose()?;
    if fault.is_some_and(|fault| fault.init.is_none()) {
        return Err(Error::plain(
            "--fault: mac and checksum are faults of the network, not of an image",
            "Give them to `cargo xtask run --fault`.",
        )
        .into());
    }
    let options = Options { fault: fault.and_then(|fault| fault.init), ..Options::from(&args.choice) };
    let image = ensure(&root, &args.choice.profile, &options)?;
    if !args.choice.quiet {
        say(&summary(&root, &image, start));
    }
    if args.graph_size || args.sbom || args.legal_info || args.menuconfig.is_some() {
        report(&root, &image, args, &options)?;
    }
    if let Some(other) = args.try_on {
        try_it::run(&root, &image.dir, &image.profile, &image.manifest, other)?;
    }
    Ok(())
}

/// Files about an image that Buildroot made.
fn report(root: &Path, image: &ImageDir, args: &ImageArgs, options: &Options) -> Result<(), Error> {
    if image.manifest.builder != BuilderName::Buildroot {
        return Err(Error::plain(
            "--menuconfig, --graph-size, --sbom and --legal-info are Buildroot's, and this image is the direct builder's",
            "Add `--builder buildroot`. What an image of either builder was made of is in its manifest.json.",
        ));
    }
    let cache = Cache::open()?;
    let wanted = Wanted::find(root, &image.profile)?;
    let options = Options { buildroot: options.buildroot.or(&image.profile), ..options.clone() };
    let request = wanted.request(root, &cache, options.quiet, &options.buildroot);
    let mut written = Vec::new();
    if let Some(menu) = args.menuconfig {
        written.extend(buildroot::menu::edit(&request, &buildroot::tree(&request)?, menu)?);
        match written.is_empty() {
            true => say("nothing was changed"),
            // The defconfigs for builds by hand are made of the same pieces.
            false => written.extend(buildroot::write::write(root)?),
        }
    }
    let report = buildroot::report::Report::open(&request)?;
    if args.graph_size {
        written.push(report.sizes(&image.out, &image.manifest)?);
    }
    if args.sbom {
        written.push(report.sbom(&image.out, &image.manifest)?);
    }
    if args.legal_info {
        written.push(report.legal(&image.out)?);
    }
    for path in written {
        say(&format!("written: {}", path.strip_prefix(root).unwrap_or(&path).display()));
    }
    Ok(())
}

/// Makes sure that the image of a profile is there, building what is missing.
pub fn ensure(root: &Path, profile: &str, options: &Options) -> Result<ImageDir, Error> {
    if !cfg!(target_os = "linux") {
        return Err(Error::plain(
            "guest images can be built on Linux only",
            "Build it on a Debian 12 or 13 machine, in a container or in WSL, copy the folder out/PROFILE here, and use \
             `cargo xtask run --image DIR`.",
        ));
    }
    let profile = Profile::load(root, profile)?;
    let options = &Options { buildroot: options.buildroot.or(&profile), ..options.clone() };
    let plan = Plan::new(root, profile, options)?;
    let cache = Cache::open()?;
    let (mut builder, or_direct) = plan.builder(root, &cache, options)?;
    let build = |builder| plan.wanted.build(root, &cache, builder, options.quiet, &options.buildroot);
    let parts = match build(builder) {
        // Nobody asked for Buildroot: it was only there to be had.
        Err(error) if or_direct => {
            eprintln!("{:?}", miette::Report::new(error));
            eprintln!(
                "Buildroot did not make the image; the direct builder does. `--builder buildroot` insists."
            );
            builder = BuilderName::Direct;
            build(builder)?
        }
        parts => parts?,
    };
    let image = plan.assemble(&parts, builder)?;
    image.store(root, &cache)
}

/// An image in a folder that was built here or elsewhere: its folder, and its manifest. All files are as the manifest
/// says.
pub fn given(dir: &Path) -> Result<(PathBuf, Manifest), Error> {
    let wrong = |what: String| {
        Error::plain(
            format!("{} holds no image: {what}", dir.display()),
            "Name a folder that `cargo xtask image` has filled, as out/lean: with Image, initrd.cpio, vm.dtb and \
             manifest.json.",
        )
    };
    let dir = dir.canonicalize().map_err(|e| wrong(e.to_string()))?;
    let bytes = std::fs::read(dir.join("manifest.json")).map_err(|e| wrong(format!("manifest.json: {e}")))?;
    let manifest: Manifest =
        serde_json::from_slice(&bytes).map_err(|e| wrong(format!("manifest.json: {e}")))?;
    if manifest.schema != manifest::SCHEMA {
        return Err(wrong(format!("its manifest has format {}, not {}", manifest.schema, manifest::SCHEMA)));
    }
    for (name, sum) in &manifest.files {
        let bytes = std::fs::read(dir.join(name)).map_err(|e| wrong(format!("{name}: {e}")))?;
        if FileSum::of(&bytes) != *sum {
            return Err(wrong(format!("{name} is not the file that manifest.json speaks of")));
        }
    }
    Ok((dir, manifest))
}

/// Everything about an image that can be known, and be wrong, before anything is built.
struct Plan {
    profile: Profile,
    wanted: Wanted,
    ram: Ram,
    /// Each with the place where the profile names it.
    overlays: Vec<(Located<String>, Overlay)>,
    init: Tree,
    template: Arc<Source>,
    /// Name of the folder in out/.
    out: String,
}

/// An image in memory.
struct Assembled {
    profile: Profile,
    manifest: Manifest,
    files: Files,
    out: String,
}

impl Plan {
    fn new(root: &Path, profile: Profile, options: &Options) -> Result<Self, Error> {
        let wanted = Wanted::find(root, &profile)?;
        let ram = options.ram.unwrap_or(profile.ram.value);
        let mut overlays = Vec::new();
        let mut layers = Layers::default();
        for name in &profile.overlays {
            let overlay = Overlay::load(root, name)?;
            layers.add(
                &format!("overlay `{}`", overlay.name),
                &overlay.tree,
                &overlay.replaces,
                Some(name),
            )?;
            overlays.push((name.clone(), overlay));
        }
        let init = init::layer(&profile, options.fault)?;
        layers.add(GENERATED, &init, &[], None)?;
        let template = dts::template(root)?;
        // With figures that fit: a broken template should not wait until the kernel is built.
        let trial = Layout::new(Ram(64 << 20), 4096, 4096, 0)?;
        let dts = dts::render(&template, &trial, &profile.bootargs)?;
        if dts::can_compile() {
            dts::check(&dts::compile(&template, &dts)?, &trial, &profile.bootargs)?;
        }
        let out = match ram == profile.ram.value {
            true => profile.name.clone(),
            false => format!("{}-{}", profile.name, ram.to_string().replace(' ', "")),
        };
        let out = match &options.fault {
            None => out,
            Some(fault) => format!("{out}-fault-{}", fault.name()),
        };
        Ok(Self { profile, wanted, ram, overlays, init, template, out })
    }

    /// Who builds: what the command line says, else the profile, else who built what is there (if that is to be kept),
    /// else whoever can, which is said. True: it is Buildroot only because its release can be downloaded.
    fn builder(&self, root: &Path, cache: &Cache, options: &Options) -> Result<(BuilderName, bool), Error> {
        if let Some(builder) = options.builder.or(self.profile.builder) {
            return Ok((builder, false));
        }
        let there = root.join("out").join(&self.out).join("manifest.json");
        if let (true, Ok(bytes)) = (options.keep, std::fs::read(&there))
            && let Ok(manifest) = serde_json::from_slice::<Manifest>(&bytes)
        {
            return Ok((manifest.builder, false));
        }
        let request = self.wanted.request(root, cache, options.quiet, &options.buildroot);
        let choice = buildroot::choice::choose(&request)?;
        if !options.quiet {
            eprintln!("{}", choice.line);
        }
        Ok((choice.builder, choice.downloads))
    }

    /// Lays the overlays and the generated files over the builder's parts.
    fn assemble(self, parts: &Parts, builder: BuilderName) -> Result<Assembled, Error> {
        let kernel = kernel_image::check(&parts.image).map_err(|e| {
            Error::plain(
                format!("{}: the kernel cannot be used: {e}", parts.image_path.display()),
                "Remove that file's folder; it is built again then.",
            )
        })?;

        let mut layers = Layers::default();
        let mut initrd = Vec::new();
        let mut inode = 1;
        let mut inputs = parts.inputs.clone();
        let mut segment = |tree: &Tree| -> Result<(), Error> {
            initrd.extend(cpio::archive(tree, inode)?);
            inode += u32::try_from(tree.len()).unwrap_or(u32::MAX - inode);
            Ok(())
        };
        segment(&layers.add("the programs", &parts.tree, &[], None)?)?;
        for (at, overlay) in &self.overlays {
            let name = format!("overlay `{}`", overlay.name);
            segment(&layers.add(&name, &overlay.tree, &overlay.replaces, Some(at))?)?;
            inputs.push(source_input(&overlay.source));
            for (path, node) in &overlay.tree {
                if let Kind::File(bytes) = &node.kind {
                    let name = format!("overlays/{}/files/{path}", overlay.name);
                    inputs.push(Input { name, version: None, sha256: sha256(bytes) });
                }
            }
        }
        segment(&layers.add(GENERATED, &self.init, &[], None)?)?;
        for (path, node) in &self.init {
            if let Kind::File(bytes) = &node.kind {
                inputs.push(Input {
                    name: format!("generated /{path}"),
                    version: None,
                    sha256: sha256(bytes),
                });
            }
        }
        inputs.push(source_input(&self.template));
        inputs.extend(self.profile.sources.iter().map(|s| source_input(s)));

        let mut layout = Layout::new(self.ram, kernel.memory_bytes, initrd.len() as u64, RAM_MARGIN)?;
        let dts = dts::render(&self.template, &layout, &self.profile.bootargs)?;
        let dtb = dts::compile(&self.template, &dts)?;
        dts::check(&dtb, &layout, &self.profile.bootargs)?;
        layout.dtb_bytes = dtb.len() as u64;
        layout.check_dtb()?;

        let mut files = Files::from([
            ("Image".to_owned(), parts.image.clone()),
            ("initrd.cpio".to_owned(), initrd),
            ("vm.dtb".to_owned(), dtb),
        ]);
        let sums: BTreeMap<String, FileSum> =
            files.iter().map(|(n, b)| (n.clone(), FileSum::of(b))).collect();
        let manifest = Manifest::new(&self.profile, builder, layout, sums, inputs)?;
        files.insert("manifest.json".to_owned(), manifest.to_json()?);
        Ok(Assembled { profile: self.profile, manifest, files, out: self.out })
    }
}

/// Finished images in the cache. Each costs a few megabytes, and takes no time to make again.
const KEPT_IMAGES: usize = 32;
/// How messages call the layer of /init.
const GENERATED: &str = "the generated files";

fn source_input(source: &Source) -> Input {
    Input { name: source.name.clone(), version: None, sha256: sha256(source.text.as_bytes()) }
}

impl Assembled {
    /// Puts the image into the cache and into out/.
    fn store(self, root: &Path, cache: &Cache) -> Result<ImageDir, Error> {
        let hash = &self.manifest.hash;
        let (dir, mut changed) = match cache.get("images", hash)? {
            Some(there) if there == self.files => (cache.path("images", hash), false),
            _ => {
                let dir = cache.put("images", hash, &self.files)?;
                // Only now, for the one just made is among the newest.
                cache.prune("images", KEPT_IMAGES);
                (dir, true)
            }
        };
        // The manifest goes first and comes last: where there is one, the other files belong to it.
        let out = root.join("out").join(&self.out);
        let manifest = out.join("manifest.json");
        if std::fs::read(&manifest).is_ok_and(|old| Some(&old) != self.files.get("manifest.json")) {
            std::fs::remove_file(&manifest).map_err(|e| Error::io("remove", &manifest, e))?;
        }
        let (last, first): (Vec<_>, Vec<_>) =
            self.files.iter().partition(|(name, _)| *name == "manifest.json");
        for (name, bytes) in first.into_iter().chain(last) {
            changed |= cache::write_if_changed(&out.join(name), bytes)?;
        }
        Ok(ImageDir { dir, out, manifest: self.manifest, profile: self.profile, changed })
    }
}

/// Two lines about an image.
fn summary(root: &Path, image: &ImageDir, start: Instant) -> String {
    let manifest = &image.manifest;
    let bytes = |name: &str| manifest.files.get(name).map_or(0, |f| f.bytes);
    let layout = &manifest.layout;
    format!(
        "{}: {} in {:.2} s, {}\n  Image {} bytes, initrd {} bytes, dtb {} bytes; RAM {}, at least {}; hash {}",
        manifest.profile,
        if image.changed { "made" } else { "nothing to do" },
        start.elapsed().as_secs_f64(),
        image.out.strip_prefix(root).unwrap_or(&image.out).display(),
        bytes("Image"),
        bytes("initrd.cpio"),
        bytes("vm.dtb"),
        Ram(layout.ram_bytes),
        Ram(layout.least_ram_bytes),
        manifest.hash.get(..16).unwrap_or(&manifest.hash),
    )
}

/// Profiles and overlays, with their descriptions.
fn list(root: &Path) -> Result<(), Error> {
    say("Profiles (profiles/NAME.yaml):");
    for name in Profile::names(root) {
        say(&format!("  {name:<12} {}", Profile::load(root, &name)?.description));
    }
    say("Overlays (overlays/NAME/):");
    for name in overlay::names(root) {
        let overlay = Overlay::read(root, &overlay::folder(root, &name), &name)?;
        say(&format!("  {name:<12} {}", overlay.description));
    }
    Ok(())
}

/// A line on standard output. Whoever closed it does not want to hear it.
fn say(line: &str) {
    use std::io::Write;
    drop(writeln!(std::io::stdout(), "{line}"));
}

#[cfg(test)]
mod same;
#[cfg(test)]
mod tests;

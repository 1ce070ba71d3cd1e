//! Everything before Buildroot builds: compiler, sources, the output folder and its configuration.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::super::direct::apt::Want;
use super::super::direct::make::{only_file, unpack_source, unpack_upstream};
use super::super::direct::share::Shared;
use super::super::direct::store::{Recipe, Store};
use super::super::direct::{host, package};
use super::super::error::Error;
use super::super::request::Request;
use super::super::step::Progress;
use super::config::{Compiler, Defconfig, Kernel, Toolchain};
use super::machine::{self, Table};
use super::make::{self, Make};
use super::plan::{self, Plan};
use super::release::{self, Tree};
use super::route::{Inputs, Route};
use super::sources::{self, Asked, HEADERS, Replaced, Sources};

/// What Buildroot told about its packages, in the output folder.
pub const SHOW_INFO: &str = "lg/show-info.json";

/// The kinds of sources to be tried, in this order: first the one that the output folder has.
pub fn wanted_sources(request: &Request) -> Vec<Sources> {
    match request.options.sources {
        Sources::Auto => match Inputs::read(&plan::output(request)).is_some_and(|i| i.distribution) {
            true => vec![Sources::Distribution, Sources::Release],
            false => vec![Sources::Release, Sources::Distribution],
        },
        one => vec![one],
    }
}

/// Sees to the programs that a build needs.
pub fn install(
    request: &Request,
    table: &Table,
    shared: Option<&Shared>,
    progress: &mut Progress,
    logs: &Path,
) -> Result<(), Error> {
    let mut needs = machine::needs(table);
    let mut pip = false;
    if let (Toolchain::External, Some(shared)) = (request.options.toolchain(), shared) {
        needs = host::needs(&needs);
        pip = shared.may_need_pip(&[Want::Linux, Want::Musl]);
    }
    host::ensure(progress, &logs.join("install.log"), &needs, pip)
}

/// Makes all that Buildroot starts from, and the output folder's configuration. Whatever would stop the build later is
/// said now.
pub fn settle(
    request: &Request,
    tree: &Tree,
    mut shared: Option<&mut Shared>,
    store: &Store,
    table: &Table,
    progress: &mut Progress,
) -> Result<Plan, Error> {
    let downloads = request.buildroot().join("dl");
    let mut last: Option<Vec<Asked>> = None;
    for sources in wanted_sources(request) {
        if sources == Sources::Distribution && shared.is_none() {
            continue;
        }
        if let Some(asked) = &last {
            let lost = asked.iter().filter(|a| a.answer.is_err()).count();
            progress.say(&format!(
                "{lost} of the files that Buildroot wants cannot be had; taking the distribution's source packages \
                 instead (--sources chooses)"
            ));
        }
        let shared = shared.as_deref_mut();
        let mut attempt = Attempt { request, tree, shared, store, table, progress, sources };
        match attempt.run(&downloads)? {
            Ok(plan) => return Ok(plan),
            Err(asked) => last = Some(asked),
        }
    }
    Err(sources::unreachable(&last.unwrap_or_default(), &downloads, request.options.toolchain()))
}

/// One kind of sources, tried.
struct Attempt<'a> {
    request: &'a Request<'a>,
    tree: &'a Tree,
    shared: Option<&'a mut Shared>,
    store: &'a Store,
    table: &'a Table,
    progress: &'a mut Progress,
    sources: Sources,
}

impl Attempt<'_> {
    fn run(&mut self, downloads: &Path) -> Result<Result<Plan, Vec<Asked>>, Error> {
        let request = self.request;
        let logs = request.buildroot().join("logs");
        let compiler = match request.options.toolchain() {
            Toolchain::External => Some(self.toolchain()?),
            Toolchain::Internal => None,
        };
        let distribution = self.sources == Sources::Distribution;
        if distribution {
            self.fetch()?;
        }
        let plan =
            Plan::new(request, &self.tree.id(&request.buildroot())?, self.shared.as_deref(), self.sources)?
                .ok_or_else(|| {
                Error::plain(
                    "the sources of this build are not settled",
                    "This is a bug; run the command again.",
                )
            })?;
        if plan.find(self.store)?.is_some() {
            return Ok(Ok(plan));
        }
        let output = plan.output(request);
        let waiting = "waiting for a build in the same folder, which an interrupted command left running";
        make::wait(&output, || self.progress.say(waiting))?;
        self.clear(&plan, &output)?;
        let external = output.join("lg/external");
        sync(&request.repo.join("buildroot-external"), &external)?;
        let empty = output.join("lg/empty");
        fs::create_dir_all(&empty).map_err(|e| Error::io("make the folder", &empty, e))?;
        let mut overrides = machine::makefile(self.table, &external, &empty)?;
        let mut replaced = Replaced::default();
        let mut kernel = Kernel::Release;
        let mut lines = self.lines(downloads, &output)?;
        if distribution {
            replaced = self.unpack(&plan)?;
            kernel = self.linux(&output)?;
            lines.push(format!("BR2_GLOBAL_PATCH_DIR=\"{}\"", output.join("lg/patches").display()));
        }
        overrides.push_str(&replaced.makefile());
        super::super::cache::write_if_changed(&output.join("lg/override.mk"), overrides.as_bytes())?;
        let mut defconfig = Defconfig::new(&plan::wanted(request), request.options.toolchain(), &kernel)?;
        defconfig.add(&lines);
        if let Some(compiler) = &compiler {
            defconfig.add_compiler(compiler);
        }
        let make = Make::new(self.tree, &output, &external)?;
        let log = logs.join(format!("configure-{}.log", request.name));
        let info = self.progress.step("configure Buildroot", Duration::from_secs(12), &log, |step| {
            make.configure(step, &defconfig)?;
            make.show_info(step)
        })?;
        let all = sources::parse(&info)?;
        super::super::cache::write_if_changed(&output.join(SHOW_INFO), info.as_bytes())?;
        let missing = sources::missing(
            &all,
            |package| self.table.contains_key(package) || replaced.trees.contains_key(package),
            downloads,
            request.options.mirror.as_deref(),
        );
        let asked = sources::ask(missing, request.options.offline);
        if !asked.is_empty() && sources::complete(&asked) {
            self.progress.say(&format!("to be downloaded:\n{}", sources::list(&asked).trim_end()));
        }
        Ok(if sources::complete(&asked) { Ok(plan) } else { Err(asked) })
    }

    /// Removes an output folder that cannot be gone on with, and says why.
    fn clear(&self, plan: &Plan, output: &Path) -> Result<(), Error> {
        let old = Inputs::read(output);
        let begun = output.join("build/build-time.log").exists();
        if let Route::Fresh(why) = plan.route_inputs.route(old.as_ref(), begun) {
            if let Some(why) = why.filter(|_| begun) {
                self.progress.say(&format!("beginning anew in {}: {why}", output.display()));
            }
            if output.exists() {
                fs::remove_dir_all(output).map_err(|e| Error::io("remove", output, e))?;
            }
            plan.route_inputs.write(output)?;
        }
        Ok(())
    }

    /// Settings that are so on this machine.
    fn lines(&self, downloads: &Path, output: &Path) -> Result<Vec<String>, Error> {
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        let mut lines = vec![
            format!("BR2_JLEVEL={jobs}"),
            format!("BR2_DL_DIR=\"{}\"", downloads.display()),
            format!("BR2_PACKAGE_OVERRIDE_FILE=\"{}\"", output.join("lg/override.mk").display()),
        ];
        if let Some(mirror) = &self.request.options.mirror {
            let site = match release::local(mirror) {
                Some(folder) => {
                    let folder =
                        folder.canonicalize().map_err(|e| Error::io("read the folder", &folder, e))?;
                    format!("file://{}", folder.display())
                }
                None => mirror.clone(),
            };
            lines.push(format!("BR2_PRIMARY_SITE=\"{site}\""));
            if self.request.options.offline {
                lines.push("BR2_PRIMARY_SITE_ONLY=y".to_owned());
            }
        }
        Ok(lines)
    }

    /// The distribution's compiler, laid out for Buildroot.
    fn toolchain(&mut self) -> Result<Compiler, Error> {
        let request = self.request;
        let shared = self.shared.as_deref_mut().ok_or_else(no_distribution)?;
        let direct = shared.toolchain(request.repo, self.progress)?;
        let key = shared.toolchain_key(request.repo)?.ok_or_else(|| {
            Error::plain("the cross compiler is gone", "Run the command again; it is made anew then.")
        })?;
        let scripts = request.repo.join("buildroot-external/buildroot/toolchain");
        let mut recipe = Recipe::default();
        recipe.add("compiler", &key.key);
        recipe.add_folder("script", &scripts, |_| false)?;
        let log = request.buildroot().join("logs/toolchain.log");
        let folder = match self.store.find("toolchain", &recipe)? {
            Some(folder) => folder,
            None => {
                let title = "lay out the compiler for Buildroot";
                self.progress.step(title, Duration::from_secs(2), &log, |step| {
                    self.store.make("toolchain", &recipe, |out| {
                        let child = duct::cmd!("sh", scripts.join("build.sh"))
                            .env("PATH", host::PATH)
                            .env("OUT", out)
                            .env("TOOLS", &scripts)
                            .env("DIRECT", &direct);
                        step.run("lay out the compiler", child)
                    })
                })?
            }
        };
        let version = duct::cmd!("riscv64-linux-gnu-gcc", "-dumpversion").env("PATH", host::PATH).read();
        let version = version.map_err(|e| {
            Error::plain(format!("the cross compiler does not tell its version: {e}"), "Install it anew.")
        })?;
        let gcc = version.split('.').next().unwrap_or_default().trim().to_owned();
        Ok(Compiler { folder, gcc, headers: key.headers })
    }

    /// Gets the distribution's sources.
    fn fetch(&mut self) -> Result<(), Error> {
        let shared = self.shared.as_deref_mut().ok_or_else(no_distribution)?;
        shared.get(self.progress, &Want::Linux)?;
        for package in package::closure(self.request.repo, self.request.packages)? {
            if let Some(name) = package.info.source {
                shared.get(self.progress, &Want::Source(name))?;
            }
        }
        Ok(())
    }

    /// Unpacks them, with those of Buildroot's patches that fit.
    fn unpack(&mut self, plan: &Plan) -> Result<Replaced, Error> {
        let mut replaced = Replaced::default();
        for package in &plan.packages {
            let Some(name) = &package.info.source else { continue };
            let want = Want::Source(name.clone());
            let shared = self.shared.as_deref_mut().ok_or_else(no_distribution)?;
            let files = shared.get(self.progress, &want)?;
            let patches = self.tree.folder.join("package").join(&package.name);
            let mut recipe = Recipe::default();
            recipe.add("source", &shared.taken(&want).map_or_else(String::new, |t| t.summary()));
            let patched = package.info.patched;
            recipe.add("patched", &patched.to_string());
            let names = patch_names(&patches);
            for name in &names {
                let path = patches.join(name);
                let bytes = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
                recipe.add("patch", &format!("{name} {}", hex::encode(Sha256::digest(bytes))));
            }
            let kind = format!("source-{}", package.name);
            let folder = match self.store.find(&kind, &recipe)? {
                Some(folder) => folder,
                None => {
                    let log = self.request.buildroot().join(format!("logs/unpack-{}.log", package.name));
                    let title = format!("unpack {}", package.name);
                    self.progress.step(&title, Duration::from_secs(3), &log, |step| {
                        self.store.make(&kind, &recipe, |out| {
                            let to = out.join("source");
                            let unpack = if patched { unpack_source } else { unpack_upstream };
                            step.run("unpack the source", unpack(&files, &to)?)?;
                            for name in &names {
                                let patch = patches.join(name);
                                // Of another version: what does not fit is not needed, or the compiler will say.
                                let script = "if patch -p1 -f -s --dry-run < \"$1\"; then patch -p1 -f -s \
                                              --no-backup-if-mismatch < \"$1\" && echo \"fits: $2\"; else echo \
                                              \"left out: $2\"; fi";
                                let child = duct::cmd!("sh", "-c", script, "sh", patch, name).dir(&to);
                                step.run("apply a patch", child)?;
                            }
                            Ok(())
                        })
                    })?
                }
            };
            replaced.trees.insert(package.name.clone(), folder.join("source"));
        }
        let headers = plan.output(self.request).join("lg/headers");
        self.headers(&headers)?;
        replaced.trees.insert(HEADERS.to_owned(), headers);
        Ok(replaced)
    }

    /// The two headers that musl has not.
    fn headers(&self, to: &Path) -> Result<(), Error> {
        fs::create_dir_all(to).map_err(|e| Error::io("make the folder", to, e))?;
        let machine = format!("/usr/include/{}-linux-gnu/sys/queue.h", std::env::consts::ARCH);
        let places = [PathBuf::from(machine), PathBuf::from("/usr/include/sys/queue.h")];
        let queue = places.iter().find(|p| p.is_file()).ok_or_else(|| {
            Error::plain("this machine has no sys/queue.h", "Run: sudo apt-get install libc6-dev")
        })?;
        let cdefs = self.tree.folder.join("package").join(HEADERS).join("cdefs.h");
        for (from, name) in [(queue, "queue.h"), (&cdefs, "cdefs.h")] {
            let bytes = fs::read(from).map_err(|e| Error::io("read", from, e))?;
            super::super::cache::write_if_changed(&to.join(name), &bytes)?;
        }
        Ok(())
    }

    /// The kernel's archive out of the distribution's package, and the checksum that Buildroot wants of it.
    fn linux(&mut self, output: &Path) -> Result<Kernel, Error> {
        let shared = self.shared.as_deref_mut().ok_or_else(no_distribution)?;
        let files = shared.get(self.progress, &Want::Linux)?;
        let taken = shared.taken(&Want::Linux).cloned().ok_or_else(|| {
            Error::plain("the kernel's source is gone from the cache", "Run the command again.")
        })?;
        let mut recipe = Recipe::default();
        recipe.add("source", &taken.summary());
        let folder = match self.store.find("linux", &recipe)? {
            Some(folder) => folder,
            None => {
                let log = self.request.buildroot().join("logs/unpack-linux.log");
                self.progress.step("unpack linux' archive", Duration::from_secs(5), &log, |step| {
                    self.store.make("linux", &recipe, |out| {
                        let deb = only_file(&files, ".deb")?;
                        let to = out.join(archive(&taken.package));
                        let script = "dpkg-deb --fsys-tarfile \"$1\" | tar --extract --to-stdout --wildcards \
                                      --file=- './usr/src/linux-source-*.tar.xz' > \"$2\" && test -s \"$2\"";
                        let child = duct::cmd!("sh", "-c", script, "sh", deb, to).env("LC_ALL", "C");
                        step.run("unpack the archive", child)
                    })
                })?
            }
        };
        let path = folder.join(archive(&taken.package));
        let bytes = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
        let line = format!("sha256  {}  {}\n", hex::encode(Sha256::digest(&bytes)), archive(&taken.package));
        let hash = output.join("lg/patches/linux/linux.hash");
        super::super::cache::write_if_changed(&hash, line.as_bytes())?;
        Ok(Kernel::Archive { path, series: taken.series().to_owned() })
    }
}

fn no_distribution() -> Error {
    Error::plain(
        "this machine has no Debian packages, of which compiler or sources would be made",
        "Use `--toolchain internal --sources release`.",
    )
}

fn archive(package: &str) -> String {
    format!("{package}.tar.xz")
}

/// Buildroot's patches of a package, in their order.
fn patch_names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|e| e.file_name().into_string().ok()).collect();
    names.retain(|n| n.ends_with(".patch"));
    names.sort();
    names
}

/// Copies our tree to where Buildroot reads it. Files that did not change keep their times: some of them are
/// prerequisites in Buildroot's makefiles.
pub fn sync(from: &Path, to: &Path) -> Result<(), Error> {
    fs::create_dir_all(to).map_err(|e| Error::io("make the folder", to, e))?;
    let names = |folder: &Path| -> Result<Vec<std::ffi::OsString>, Error> {
        let entries = fs::read_dir(folder).map_err(|e| Error::io("read the folder", folder, e))?;
        Ok(entries.flatten().map(|e| e.file_name()).collect())
    };
    let wanted = names(from)?;
    for name in names(to)?.iter().filter(|n| !wanted.contains(n)) {
        let path = to.join(name);
        let gone = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        gone.map_err(|e| Error::io("remove", &path, e))?;
    }
    for name in &wanted {
        let (source, path) = (from.join(name), to.join(name));
        if source.is_dir() {
            sync(&source, &path)?;
            continue;
        }
        let bytes = fs::read(&source).map_err(|e| Error::io("read", &source, e))?;
        if super::super::cache::write_if_changed(&path, &bytes)? {
            let mode = fs::metadata(&source).map_err(|e| Error::io("read", &source, e))?.permissions();
            fs::set_permissions(&path, mode).map_err(|e| Error::io("set the mode of", &path, e))?;
        }
    }
    Ok(())
}

/// A package's folder below build/.
pub fn source_folder(output: &Path, package: &str) -> Result<PathBuf, Error> {
    let build = output.join("build");
    let entries = fs::read_dir(&build).map_err(|e| Error::io("read the folder", &build, e))?;
    let prefix = format!("{package}-");
    let fits = |name: &str| {
        name.strip_prefix(&prefix)
            .is_some_and(|v| v == "custom" || v.starts_with(|c: char| c.is_ascii_digit()))
    };
    let mut all: Vec<PathBuf> = entries
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.file_name().and_then(|n| n.to_str()).is_some_and(fits))
        .filter(|p| p.join(".stamp_built").exists())
        .collect();
    all.sort();
    all.pop().ok_or_else(|| {
        Error::plain(format!("{} holds no built {package}", build.display()), "Run the command again.")
    })
}

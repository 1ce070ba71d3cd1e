//! Files about an image: what takes how much room, a bill of materials, licences and sources. Made here and not by
//! Buildroot's own targets, which want a network, matplotlib, or the sources of what the machine's programs stand for.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::json;

use super::super::cache::write_if_changed;
use super::super::direct::apt::Want;
use super::super::direct::share::Shared;
use super::super::error::Error;
use super::super::manifest::Manifest;
use super::super::request::Request;
use super::Toolchain;
use super::plan;
use super::prepare::{SHOW_INFO, source_folder};
use super::route::Inputs;

/// What show-info tells about a package of the image.
#[derive(Clone, Debug, Deserialize)]
struct Info {
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default, rename = "virtual")]
    is_virtual: Option<bool>,
    #[serde(default)]
    version: Option<String>,
    #[serde(default)]
    licenses: Option<String>,
    #[serde(default)]
    license_files: Vec<String>,
    #[serde(default)]
    dl_dir: Option<String>,
    #[serde(default)]
    downloads: Vec<super::sources::Download>,
    #[serde(default, rename = "cpe-id")]
    cpe: Option<String>,
}

/// A package whose files, or the kernel itself, are in the image.
#[derive(Clone, Debug)]
struct Component {
    name: String,
    version: String,
    info: Info,
    /// The distribution's source package, where it was taken.
    taken: Option<(String, BTreeMap<String, String>)>,
}

/// An output folder that has been built.
pub struct Report<'a> {
    request: &'a Request<'a>,
    output: PathBuf,
    components: Vec<Component>,
}

/// The C library, where the compiler is the distribution's.
const MUSL: &str = "musl";
/// Packages that bring no file of their own, only headers or folders.
const NOTHING: &[&str] = &["skeleton-custom", "toolchain-external-custom", "musl-compat-headers"];

impl<'a> Report<'a> {
    /// Reads what a build left. The image must have been built.
    pub fn open(request: &'a Request<'a>) -> Result<Self, Error> {
        let output = plan::output(request);
        let path = output.join(SHOW_INFO);
        let gone = || {
            Error::plain(
                format!("{} is gone: what Buildroot knew about this image lay there", output.display()),
                format!(
                    "Remove {}/image-* and run the command again: it is built anew then.",
                    request.buildroot().display()
                ),
            )
        };
        let text = fs::read_to_string(&path).map_err(|_| gone())?;
        let all: BTreeMap<String, Info> =
            serde_json::from_str(text.get(text.find('{').unwrap_or(0)..).unwrap_or("")).map_err(|e| {
                Error::plain(format!("{}: {e}", path.display()), "Remove it and build again.")
            })?;
        let distribution = Inputs::read(&output).ok_or_else(gone)?.distribution;
        let shared = match distribution || request.options.toolchain() == Toolchain::External {
            true => Some(Shared::open(request.cache)?),
            false => None,
        };
        let packages = super::super::direct::package::closure(request.repo, request.packages)?;
        let mut components = Vec::new();
        for (name, info) in all {
            let real =
                info.kind == "target" && info.is_virtual != Some(true) && !NOTHING.contains(&name.as_str());
            if !real {
                continue;
            }
            let want = match packages.iter().find(|p| p.name == name).and_then(|p| p.info.source.clone()) {
                Some(source) => Some(Want::Source(source)),
                None if name == "linux" => Some(Want::Linux),
                None => None,
            };
            let taken =
                shared.as_ref().filter(|_| distribution).zip(want).and_then(|(s, w)| s.taken(&w).cloned());
            let own = taken.as_ref().map(|t| t.version.clone());
            let version = own.or_else(|| info.version.clone()).filter(|v| !v.is_empty());
            components.push(Component {
                name,
                version: version.unwrap_or_else(|| env!("CARGO_PKG_VERSION").to_owned()),
                taken: taken.map(|t| (t.package, t.files)),
                info,
            });
        }
        // In every program: it is linked statically.
        if let Some(musl) = shared.as_ref().and_then(|s| s.taken(&Want::Musl).cloned()) {
            let info = Info {
                kind: "target".to_owned(),
                is_virtual: None,
                version: None,
                licenses: Some("MIT".to_owned()),
                license_files: Vec::new(),
                dl_dir: None,
                downloads: Vec::new(),
                cpe: None,
            };
            let version = match musl.is_wheel() {
                true => format!("in {} {}", musl.package, musl.version),
                false => musl.version.clone(),
            };
            let taken = Some((musl.package, musl.files));
            components.push(Component { name: MUSL.to_owned(), version, info, taken });
        }
        Ok(Self { request, output, components })
    }

    /// A bill of materials in CycloneDX' JSON.
    pub fn sbom(&self, image: &Path, manifest: &Manifest) -> Result<PathBuf, Error> {
        let components: Vec<serde_json::Value> = self
            .components
            .iter()
            .map(|c| {
                let mut value = json!({
                    "type": if c.name == "linux" { "operating-system" } else { "application" },
                    "bom-ref": format!("{}@{}", c.name, c.version),
                    "name": c.name,
                    "version": c.version,
                });
                if let Some(licence) = c.info.licenses.as_ref().filter(|l| !l.is_empty()) {
                    value["licenses"] = json!([{ "license": { "name": licence } }]);
                }
                // Of another version than Buildroot's, its identifier would be wrong.
                if let (None, Some(cpe)) = (&c.taken, &c.info.cpe) {
                    value["cpe"] = json!(cpe);
                }
                if let Some((package, files)) = &c.taken {
                    if !c.version.starts_with("in ") {
                        value["purl"] = json!(format!("pkg:deb/debian/{package}@{}?arch=source", c.version));
                    }
                    let properties: Vec<_> = files
                        .iter()
                        .map(|(n, s)| json!({ "name": format!("sha256:{n}"), "value": s }))
                        .collect();
                    value["properties"] = json!(properties);
                }
                value
            })
            .collect();
        let bom = json!({
            "bomFormat": "CycloneDX",
            "specVersion": "1.5",
            "version": 1,
            "metadata": { "component": {
                "type": "firmware",
                "bom-ref": format!("image@{}", manifest.hash),
                "name": format!("linux-on-gpu-{}", manifest.profile),
                "version": manifest.hash,
                "hashes": manifest.files.get("initrd.cpio").map(|f| json!([{ "alg": "SHA-256", "content": f.sha256 }])),
            } },
            "components": components,
            "dependencies": [{
                "ref": format!("image@{}", manifest.hash),
                "dependsOn": self.components.iter().map(|c| format!("{}@{}", c.name, c.version)).collect::<Vec<_>>(),
            }],
        });
        let mut text = serde_json::to_string_pretty(&bom).map_err(|e| {
            Error::plain(format!("cannot write the bill of materials: {e}"), "This is a bug.")
        })?;
        text.push('\n');
        let path = image.join("sbom.cdx.json");
        write_if_changed(&path, text.as_bytes())?;
        Ok(path)
    }

    /// Licence texts and sources of all that is in the image, with a list.
    pub fn legal(&self, image: &Path) -> Result<PathBuf, Error> {
        let folder = image.join("legal-info");
        if folder.exists() {
            fs::remove_dir_all(&folder).map_err(|e| Error::io("remove", &folder, e))?;
        }
        let mut list = "\"package\",\"version\",\"licence\",\"licence files\",\"sources\"\n".to_owned();
        let shared = Shared::open(self.request.cache).ok();
        for c in &self.components {
            let licences = self.licences(c, &folder.join("licenses").join(&c.name))?;
            let to = folder.join("sources").join(&c.name);
            let sources = self.sources(c, shared.as_ref(), &to)?;
            let licence = c.info.licenses.as_deref().unwrap_or("unknown");
            let _ = writeln!(
                list,
                "\"{}\",\"{}\",\"{licence}\",\"{}\",\"{}\"",
                c.name,
                c.version,
                licences.join(" "),
                sources.join(" ")
            );
        }
        write_if_changed(&folder.join("manifest.csv"), list.as_bytes())?;
        Ok(folder)
    }

    fn licences(&self, c: &Component, to: &Path) -> Result<Vec<String>, Error> {
        let own = self.request.repo.join("buildroot-external/package").join(&c.name).join("src");
        if own.is_dir() {
            return Ok(vec![copy(&self.request.repo.join("LICENSE"), to, "LICENSE")?]);
        }
        if let (MUSL, Some(shared)) = (c.name.as_str(), Shared::open(self.request.cache).ok()) {
            return musl_licence(&shared, to);
        }
        let from = source_folder(&self.output, &c.name)?;
        let mut names: Vec<String> =
            c.info.license_files.iter().filter(|n| from.join(n).is_file()).cloned().collect();
        if names.is_empty() {
            // Of another version: what looks like one.
            let entries = fs::read_dir(&from).map_err(|e| Error::io("read the folder", &from, e))?;
            names = entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect();
            names.retain(|n| n.starts_with("COPYING") || n.starts_with("LICEN") || n == "COPYRIGHT");
            names.sort();
        }
        if names.is_empty() {
            return Err(Error::plain(
                format!("{} has no licence file that could be found in {}", c.name, from.display()),
                "Look there, and name it in the package's NAME_LICENSE_FILES.",
            ));
        }
        names.iter().map(|n| copy(&from.join(n), to, n)).collect()
    }

    fn sources(&self, c: &Component, shared: Option<&Shared>, to: &Path) -> Result<Vec<String>, Error> {
        let mut copied = Vec::new();
        if let (Some((package, _)), Some(shared)) = (&c.taken, shared) {
            let want = match c.name.as_str() {
                "linux" => Want::Linux,
                MUSL => Want::Musl,
                _ => Want::Source(package.clone()),
            };
            let files = shared.find(&want)?.ok_or_else(|| {
                Error::plain(format!("the source of {} is gone from the cache", c.name), "Build it again.")
            })?;
            for entry in fs::read_dir(&files).map_err(|e| Error::io("read the folder", &files, e))?.flatten()
            {
                let name = entry.file_name().to_string_lossy().into_owned();
                copied.push(copy(&entry.path(), to, &name)?);
            }
        } else {
            let downloads =
                self.request.buildroot().join("dl").join(c.info.dl_dir.as_deref().unwrap_or(&c.name));
            for download in &c.info.downloads {
                let path = downloads.join(&download.source);
                if path.is_file() {
                    copied.push(copy(&path, to, &download.source)?);
                }
            }
        }
        copied.sort();
        Ok(copied)
    }

    /// What takes how much room: a table, and a picture of it.
    pub fn sizes(&self, image: &Path, manifest: &Manifest) -> Result<PathBuf, Error> {
        let list = self.output.join("build/packages-file-list.txt");
        let text = fs::read_to_string(&list).map_err(|e| Error::io("read", &list, e))?;
        let target = self.output.join("target");
        // Buildroot installs, later packages over earlier ones: the last one counts.
        let owners: BTreeMap<&str, &str> = text
            .lines()
            .filter_map(|l| l.split_once(','))
            .map(|(p, f)| (f.trim_start_matches("./"), p))
            .collect();
        let mut table = "package,path,bytes\n".to_owned();
        let mut sums: BTreeMap<String, u64> = BTreeMap::new();
        for (path, package) in &owners {
            let Ok(meta) = target.join(path).symlink_metadata() else { continue };
            if meta.is_file() && *path != "THIS_IS_NOT_YOUR_ROOT_FILESYSTEM" {
                let _ = writeln!(table, "{package},/{path},{}", meta.len());
                *sums.entry((*package).to_owned()).or_default() += meta.len();
            }
        }
        let bytes = |name: &str| manifest.files.get(name).map_or(0, |f| f.bytes);
        let programs: u64 = sums.values().sum();
        sums.insert("overlays and /init".to_owned(), bytes("initrd.cpio").saturating_sub(programs));
        sums.insert("linux".to_owned(), bytes("Image"));
        let _ = writeln!(table, "linux,Image,{}", bytes("Image"));
        write_if_changed(&image.join("sizes.csv"), table.as_bytes())?;
        let mut bars: Vec<(String, u64)> = sums.into_iter().collect();
        bars.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        let path = image.join("sizes.svg");
        write_if_changed(&path, picture(&manifest.profile, &bars).as_bytes())?;
        Ok(path)
    }
}

/// musl's licence, out of its archive.
fn musl_licence(shared: &Shared, to: &Path) -> Result<Vec<String>, Error> {
    let missing = || {
        Error::plain(
            "musl's licence cannot be read from its archive",
            "Build the image again, and try once more.",
        )
    };
    let files = shared.find(&Want::Musl)?.ok_or_else(missing)?;
    let script = "set -e; cd \"$1\"; for file in *; do case $file in *.whl) unzip -p \"$file\" \
                  ziglang/lib/libc/musl/COPYRIGHT;; *.orig.tar.*) tar -xOf \"$file\" --wildcards '*/COPYRIGHT';; esac; done";
    let text = duct::cmd!("sh", "-c", script, "sh", files).stderr_null().read().map_err(|_| missing())?;
    if text.trim().is_empty() {
        return Err(missing());
    }
    write_if_changed(&to.join("COPYRIGHT"), format!("{text}\n").as_bytes())?;
    Ok(vec!["COPYRIGHT".to_owned()])
}

/// Bars of bytes as SVG.
fn picture(title: &str, bars: &[(String, u64)]) -> String {
    let most = bars.iter().map(|b| b.1).max().unwrap_or(1).max(1);
    let height = 50 + bars.len() * 24;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"760\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<text x=\"10\" y=\"22\" font-size=\"16\">{title}: bytes by package</text>\n"
    );
    for (i, (name, bytes)) in bars.iter().enumerate() {
        let y = 40 + i * 24;
        let width = (bytes * 440 / most).max(1);
        let _ = writeln!(
            svg,
            "<text x=\"150\" y=\"{}\" text-anchor=\"end\">{name}</text><rect x=\"158\" y=\"{y}\" width=\"{width}\" \
             height=\"18\" fill=\"#47a\"/><text x=\"{}\" y=\"{}\">{bytes}</text>",
            y + 14,
            164 + width,
            y + 14
        );
    }
    svg.push_str("</svg>\n");
    svg
}

fn copy(from: &Path, to: &Path, name: &str) -> Result<String, Error> {
    let to = to.join(name);
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder).map_err(|e| Error::io("make the folder", folder, e))?;
    }
    fs::copy(from, &to).map_err(|e| Error::io("copy", from, e))?;
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_picture_has_a_bar_for_each() {
        let svg = picture(
            "lean",
            &[("linux".to_owned(), 2_000_000), ("nginx".to_owned(), 400_000), ("x".to_owned(), 0)],
        );
        assert_eq!(svg.matches("<rect").count(), 3);
        assert!(svg.contains("width=\"440\"") && svg.contains(">400000</text>"), "{svg}");
    }
}

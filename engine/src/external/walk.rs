//! Resolves paths, folders and patterns to files; visits each real folder once, within limits.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, FileType, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use glob::{MatchOptions, Pattern};

use super::{External, InputFiles, InputPath, absolute};
use crate::error::{At, Error, Result};

/// Maximum number of names to look at below one path.
const MAX_NAMES: usize = 1_000_000;
/// Maximum number of files that one path may match.
const MAX_FILES: usize = 100_000;

const HELP: &str = "relative paths start from the folder of the pipeline file; hidden names match only a written dot";

/// `*` and `[…]` match neither `/` nor the leading dot of a hidden name.
const OPTIONS: MatchOptions =
    MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: true };

/// The files that a parameter names.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// In reading order.
    pub entries: Vec<Entry>,
    /// Whether the store was among them and was left out.
    pub without_store: bool,
}

/// A file, or another name of a file or folder that is already listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub path: PathBuf,
    /// The path relative to the named folder, or to the literal prefix of a pattern; empty for a file that was named
    /// directly.
    pub name: PathBuf,
    /// Whether it is already listed under another name.
    pub again: bool,
    /// Whether the path goes through a symlink.
    linked: bool,
}

impl Listing {
    /// The files, without duplicates.
    pub fn files(&self) -> Vec<PathBuf> {
        self.entries.iter().filter(|entry| !entry.again).map(|entry| entry.path.clone()).collect()
    }
}

/// Lists the files that a parameter names, without the folder `store`, wherever that is.
///
/// # Errors
/// If a path names nothing, or the store, or exceeds the limits; an invalid pattern, or one without matches; an
/// unreadable folder; a matched dangling link.
pub fn list(external: &External, store: Option<&Path>) -> Result<Listing> {
    let store = store.map(fs::canonicalize).and_then(Result::ok);
    let mut listing = Listing::default();
    match external {
        External::Path(InputPath(path)) => list_path(path, None, store.as_deref(), &mut listing)?,
        External::Files(files) => {
            for path in &files.paths {
                let before = listing.entries.len();
                list_written(files, path, store.as_deref(), &mut listing)?;
                if listing.entries.len() == before {
                    let (path, outside) = (absolute(&files.base, path), listing.without_store);
                    let outside = if outside { " outside the store" } else { "" };
                    return Err(Error::yours(format!("{}: no file{outside}", path.display())).help(HELP));
                }
            }
            if let Some(entry) = listing.entries.iter().find(|entry| entry.path.to_str().is_none()) {
                return Err(Error::yours(format!("{}: the name is not UTF-8", entry.path.display()))
                    .help("rename the file, or leave it out of the pattern"));
            }
        }
    }
    if external.written().len() > 1 || listing.entries.iter().any(|entry| entry.linked) {
        mark_repeats(&mut listing.entries);
    }
    Ok(listing)
}

/// Whether a path that does not exist is a pattern.
pub fn is_pattern(path: &Path) -> bool {
    path.to_string_lossy().contains(['*', '?', '['])
}

/// Lists a path as written: a file, a folder or a pattern.
fn list_written(files: &InputFiles, written: &Path, store: Option<&Path>, listing: &mut Listing) -> Result<()> {
    let whole = absolute(&files.base, written);
    if whole.exists() || !is_pattern(written) {
        let matching = files.matching.as_deref().map(|pattern| parse(pattern, &format!("matching: {pattern}")));
        return list_path(&whole, matching.transpose()?, store, listing);
    }
    let mut root = files.base.clone();
    let mut parts = Vec::new();
    for component in written.components() {
        let text = component.as_os_str().to_string_lossy();
        let literal = !matches!(component, Component::Normal(_)) || !is_pattern(component.as_ref());
        if parts.is_empty() && (literal || fs::symlink_metadata(root.join(component)).is_ok()) {
            root.push(component);
        } else if literal {
            parts.push(Part::Literal(text.into_owned()));
        } else if text == "**" {
            // Several in a row are equivalent to one.
            if !matches!(parts.last(), Some(Part::AnyFolders)) {
                parts.push(Part::AnyFolders);
            }
        } else {
            parts.push(Part::Written(parse(&text, &whole.display().to_string())?));
        }
    }
    if matches!(parts.last(), Some(Part::AnyFolders)) {
        parts.push(Part::Matching(any_name()));
    }
    let root: PathBuf = root.components().collect();
    refuse_store(&root, store)?;
    let mut walk = Walk::new(&root, &parts, store);
    walk.run()?;
    if walk.found.is_empty() {
        let left_out = if walk.without_store { " outside the store" } else { "" };
        return Err(Error::yours(format!("{}: no file{left_out} matches", whole.display())).help(HELP));
    }
    walk.finish(listing);
    Ok(())
}

/// Lists a literal path: a file, or the files below a folder whose names match `matching`.
fn list_path(path: &Path, matching: Option<Pattern>, store: Option<&Path>, listing: &mut Listing) -> Result<()> {
    let metadata = match fs::metadata(path) {
        Err(e) if is_nothing(&e) => {
            return Err(Error::yours(format!("{}: no such file or folder", path.display())).help(HELP));
        }
        other => other.at(path)?,
    };
    refuse_store(path, store)?;
    if metadata.is_file() {
        let linked = fs::symlink_metadata(path).at(path)?.is_symlink();
        listing.entries.push(Entry { path: path.to_owned(), name: PathBuf::new(), again: false, linked });
        return Ok(());
    }
    if !metadata.is_dir() {
        return Err(Error::yours(format!("{}: expected a file or a folder", path.display())));
    }
    let pattern = matching.as_ref().map(|pattern| pattern.as_str().to_owned());
    let parts = [Part::AnyFolders, Part::Matching(matching.unwrap_or_else(any_name))];
    let mut walk = Walk::new(path, &parts, store);
    walk.run()?;
    if let (true, Some(pattern)) = (walk.found.is_empty(), pattern) {
        return Err(Error::yours(format!("{}: no file that matches `{pattern}`", path.display())));
    }
    walk.finish(listing);
    Ok(())
}

fn any_name() -> Pattern {
    // Never fails: `*` is a valid pattern.
    Pattern::new("*").unwrap_or_default()
}

fn parse(pattern: &str, shown: &str) -> Result<Pattern> {
    Pattern::new(pattern).map_err(|e| Error::yours(format!("{shown}: not a pattern: {}", e.msg)))
}

/// Rejects paths in the store, except a single artifact: the other folders change while a pipeline runs.
fn refuse_store(path: &Path, store: Option<&Path>) -> Result<()> {
    let (Some(store), Ok(real)) = (store, fs::canonicalize(path)) else { return Ok(()) };
    let Ok(within) = real.strip_prefix(store) else { return Ok(()) };
    let mut parts = within.components();
    if parts.next() == Some(Component::Normal("artifacts".as_ref())) && parts.next().is_some() {
        return Ok(());
    }
    let what = if within.as_os_str().is_empty() { "this is the store" } else { "this lies in the store" };
    Err(Error::yours(format!("{}: {what}, which changes with every run", path.display()))
        .help("name your own files, or put the store elsewhere with `--store DIR`"))
}

/// One component of a pattern.
enum Part {
    Literal(String),
    /// A pattern written by the user; a name equal to it is taken literally.
    Written(Pattern),
    Matching(Pattern),
    /// `**`
    AnyFolders,
}

/// A folder in which matching continues with part `at` of the pattern.
struct Step {
    folder: PathBuf,
    at: usize,
    linked: bool,
}

struct Walk<'a> {
    root: &'a Path,
    parts: &'a [Part],
    /// Device and inode of the store.
    store: Option<(u64, u64)>,
    without_store: bool,
    /// Visited real folders by device, inode and part of the pattern, each with the path of the visit.
    visited: HashMap<(u64, u64, usize), PathBuf>,
    names: usize,
    folders: Vec<Step>,
    /// Folders behind symlinks, by path; visited last, so that a folder is listed under its real name.
    links: BTreeMap<(PathBuf, usize), Step>,
    found: Vec<Entry>,
}

impl<'a> Walk<'a> {
    fn new(root: &'a Path, parts: &'a [Part], store: Option<&Path>) -> Self {
        let identity = store.and_then(|store| fs::metadata(store).ok()).map(|m| (m.dev(), m.ino()));
        Self {
            root,
            parts,
            store: identity,
            without_store: false,
            visited: HashMap::new(),
            names: 0,
            folders: vec![Step { folder: root.to_owned(), at: 0, linked: false }],
            links: BTreeMap::new(),
            found: Vec::new(),
        }
    }

    fn run(&mut self) -> Result<()> {
        while let Some(step) = self.folders.pop().or_else(|| self.links.pop_first().map(|(_, step)| step)) {
            self.visit(&step)?;
        }
        Ok(())
    }

    fn visit(&mut self, step: &Step) -> Result<()> {
        let folder = &step.folder;
        let metadata = match fs::metadata(folder) {
            Ok(metadata) if metadata.is_dir() => metadata,
            // This folder lacks a literal part, or there is a file where the pattern expects a folder.
            Ok(_) => return Ok(()),
            Err(e) if is_nothing(&e) => return Ok(()),
            Err(e) => return Err(e).at(folder),
        };
        if self.store == Some((metadata.dev(), metadata.ino())) {
            self.without_store = true;
            return Ok(());
        }
        let first = self.visited.entry((metadata.dev(), metadata.ino(), step.at)).or_insert_with(|| folder.clone());
        if *first != *folder {
            self.push(folder.clone(), true, true);
            return Ok(());
        }
        match &self.parts[step.at] {
            Part::Literal(name) => {
                let path = folder.join(name);
                match fs::symlink_metadata(&path) {
                    Ok(metadata) => self.take(step, path, metadata.file_type())?,
                    Err(e) if is_nothing(&e) => {}
                    Err(e) => return Err(e).at(&path),
                }
            }
            part @ (Part::Written(pattern) | Part::Matching(pattern)) => {
                let itself = folder.join(pattern.as_str());
                if let (Part::Written(_), Ok(metadata)) = (part, fs::symlink_metadata(&itself)) {
                    return self.take(step, itself, metadata.file_type());
                }
                for (path, kind) in self.names_in(folder)? {
                    let name = path.file_name().unwrap_or_default().to_string_lossy();
                    if pattern.matches_with(&name, OPTIONS) {
                        self.take(step, path, kind)?;
                    }
                }
            }
            Part::AnyFolders => {
                self.folders.push(Step { folder: folder.clone(), at: step.at + 1, linked: step.linked });
                for (path, kind) in self.names_in(folder)? {
                    let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
                    if !hidden && (kind.is_dir() || (kind.is_symlink() && path.is_dir())) {
                        self.descend(path, step.at, kind.is_symlink(), step.linked);
                    }
                }
            }
        }
        Ok(())
    }

    /// Handles a name that matches the part of `step`: a file if it is the last part, else a folder in which to
    /// continue.
    fn take(&mut self, step: &Step, path: PathBuf, kind: FileType) -> Result<()> {
        if step.at + 1 < self.parts.len() {
            self.descend(path, step.at + 1, kind.is_symlink(), step.linked);
            return Ok(());
        }
        let is_file = if kind.is_symlink() { target(&path)?.is_file() } else { kind.is_file() };
        if is_file {
            self.push(path, false, step.linked || kind.is_symlink());
        }
        if self.found.len() > MAX_FILES {
            return Err(self.too_many(&format!("more than {MAX_FILES} files")));
        }
        Ok(())
    }

    fn descend(&mut self, folder: PathBuf, at: usize, is_link: bool, linked: bool) {
        let step = Step { folder, at, linked: linked || is_link };
        if step.linked {
            self.links.insert((step.folder.clone(), at), step);
        } else {
            self.folders.push(step);
        }
    }

    fn names_in(&mut self, folder: &Path) -> Result<Vec<(PathBuf, FileType)>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(folder).at(folder)? {
            let entry = entry.at(folder)?;
            self.names += 1;
            if self.names > MAX_NAMES {
                return Err(self.too_many(&format!("more than {MAX_NAMES} names to look at")));
            }
            names.push((entry.path(), entry.file_type().at(folder)?));
        }
        Ok(names)
    }

    fn push(&mut self, path: PathBuf, again: bool, linked: bool) {
        // Every path found lies below the root.
        let name = path.strip_prefix(self.root).unwrap_or(&path).to_owned();
        self.found.push(Entry { path, name, again, linked });
    }

    fn too_many(&self, what: &str) -> Error {
        Error::yours(format!("{}: {what}", self.root.display())).help("name a narrower folder or pattern")
    }

    fn finish(mut self, listing: &mut Listing) {
        self.found.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        self.found.dedup_by(|a, b| a.path == b.path);
        listing.entries.append(&mut self.found);
        listing.without_store |= self.without_store;
    }
}

/// Whether the path does not exist, or is a link loop.
fn is_nothing(e: &std::io::Error) -> bool {
    let loops = e.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error());
    loops || matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory)
}

/// Metadata of the target of a link.
fn target(link: &Path) -> Result<Metadata> {
    fs::metadata(link).map_err(|e| {
        Error::yours(format!("{}: a link that leads to no file: {e}", link.display()))
            .help("mend or delete the link, or leave it out of the pattern")
    })
}

/// Marks every entry of a real file except the best one: the first without a symlink, else the first.
fn mark_repeats(entries: &mut [Entry]) {
    let mut real = HashSet::new();
    let mut order: Vec<usize> = (0..entries.len()).filter(|i| !entries[*i].again).collect();
    order.sort_by_key(|i| entries[*i].linked);
    for i in order {
        let path = fs::canonicalize(&entries[i].path).unwrap_or_else(|_| entries[i].path.clone());
        entries[i].again = !real.insert(path);
    }
}

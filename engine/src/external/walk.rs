//! Resolves paths, folders and patterns to files; visits each real folder once, within limits.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, FileType, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use glob::{MatchOptions, Pattern};

use super::{ExternalInput, InputFiles, InputPath, absolute};
use crate::error::{AtPath, Error, Result};

/// Maximum number of names to look at below one path.
const MAX_NAMES: usize = 1_000_000;
/// Maximum number of files that one path may match.
const MAX_FILES: usize = 100_000;

const PATH_HELP: &str = "relative paths start from the folder of the pipeline file; hidden names match only a pattern that contains the dot";

/// `*` and `[…]` match neither `/` nor the leading dot of a hidden name.
const OPTIONS: MatchOptions =
    MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: true };

/// The files that a parameter names.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// In reading order.
    pub entries: Vec<ListedFile>,
    /// Whether the store was among them and was left out.
    pub store_excluded: bool,
}

/// A file, or another name of a file or folder that is already listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedFile {
    pub path: PathBuf,
    /// The path relative to the named folder, or to the literal prefix of a pattern; empty for a file that was named
    /// directly.
    pub name: PathBuf,
    /// Whether it is already listed under another name.
    pub is_repeat: bool,
    /// Whether the path goes through a symlink.
    through_link: bool,
}

impl Listing {
    /// The files, without duplicates.
    pub fn files(&self) -> Vec<PathBuf> {
        self.entries.iter().filter(|entry| !entry.is_repeat).map(|entry| entry.path.clone()).collect()
    }
}

/// Lists the files that a parameter names, without the folder `store`, wherever that is.
///
/// # Errors
/// If a path names nothing, or the store, or exceeds the limits; an invalid pattern, or one without matches; an
/// unreadable folder; a matched dangling link.
pub fn list(external: &ExternalInput, store: Option<&Path>) -> Result<Listing> {
    let store = store.map(fs::canonicalize).and_then(Result::ok);
    let mut listing = Listing::default();
    match external {
        ExternalInput::Path(InputPath(path)) => list_path(path, None, store.as_deref(), &mut listing)?,
        ExternalInput::Files(files) => {
            for path in &files.paths {
                let before = listing.entries.len();
                list_written(files, path, store.as_deref(), &mut listing)?;
                if listing.entries.len() == before {
                    let (path, outside) = (absolute(&files.base, path), listing.store_excluded);
                    let outside = if outside { " outside the store" } else { "" };
                    return Err(Error::user(format!("{}: no file{outside}", path.display())).help(PATH_HELP));
                }
            }
            if let Some(entry) = listing.entries.iter().find(|entry| entry.path.to_str().is_none()) {
                return Err(Error::user(format!("{}: the name is not UTF-8", entry.path.display()))
                    .help("rename the file, or exclude it from the pattern"));
            }
        }
    }
    if external.absolute_paths().len() > 1 || listing.entries.iter().any(|entry| entry.through_link) {
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
            parts.push(PatternPart::Literal(text.into_owned()));
        } else if text == "**" {
            // Several in a row are equivalent to one.
            if !matches!(parts.last(), Some(PatternPart::AnyFolders)) {
                parts.push(PatternPart::AnyFolders);
            }
        } else {
            parts.push(PatternPart::LiteralOrWildcard(parse(&text, &whole.display().to_string())?));
        }
    }
    if matches!(parts.last(), Some(PatternPart::AnyFolders)) {
        parts.push(PatternPart::Wildcard(any_name()));
    }
    let root: PathBuf = root.components().collect();
    reject_store_path(&root, store)?;
    let mut walk = Walk::new(&root, &parts, store);
    walk.run()?;
    if walk.found.is_empty() {
        let left_out = if walk.store_excluded { " outside the store" } else { "" };
        return Err(Error::user(format!("{}: no file{left_out} matches", whole.display())).help(PATH_HELP));
    }
    walk.finish(listing);
    Ok(())
}

/// Lists a literal path: a file, or the files below a folder whose names match `matching`.
fn list_path(path: &Path, matching: Option<Pattern>, store: Option<&Path>, listing: &mut Listing) -> Result<()> {
    let metadata = match fs::metadata(path) {
        Err(e) if is_not_found(&e) => {
            return Err(Error::user(format!("{}: no such file or folder", path.display())).help(PATH_HELP));
        }
        other => other.at(path)?,
    };
    reject_store_path(path, store)?;
    if metadata.is_file() {
        let through_link = fs::symlink_metadata(path).at(path)?.is_symlink();
        listing.entries.push(ListedFile {
            path: path.to_owned(),
            name: PathBuf::new(),
            is_repeat: false,
            through_link,
        });
        return Ok(());
    }
    if !metadata.is_dir() {
        return Err(Error::user(format!("{}: expected a file or a folder", path.display())));
    }
    let pattern = matching.as_ref().map(|pattern| pattern.as_str().to_owned());
    let parts = [PatternPart::AnyFolders, PatternPart::Wildcard(matching.unwrap_or_else(any_name))];
    let mut walk = Walk::new(path, &parts, store);
    walk.run()?;
    if let (true, Some(pattern)) = (walk.found.is_empty(), pattern) {
        return Err(Error::user(format!("{}: no file matches `{pattern}`", path.display())));
    }
    walk.finish(listing);
    Ok(())
}

fn any_name() -> Pattern {
    // Never fails: `*` is a valid pattern.
    Pattern::new("*").unwrap_or_default()
}

fn parse(pattern: &str, shown: &str) -> Result<Pattern> {
    Pattern::new(pattern).map_err(|e| Error::user(format!("{shown}: invalid pattern: {}", e.msg)))
}

/// Rejects paths in the store, except a single artifact: the other folders change while a pipeline runs.
fn reject_store_path(path: &Path, store: Option<&Path>) -> Result<()> {
    let (Some(store), Ok(real)) = (store, fs::canonicalize(path)) else { return Ok(()) };
    let Ok(within) = real.strip_prefix(store) else { return Ok(()) };
    let mut parts = within.components();
    if parts.next() == Some(Component::Normal("artifacts".as_ref())) && parts.next().is_some() {
        return Ok(());
    }
    let what = if within.as_os_str().is_empty() { "the path is the store" } else { "the path lies in the store" };
    Err(Error::user(format!("{}: {what}, which changes with every run", path.display()))
        .help("choose files outside the store, or move the store with `--store FOLDER`"))
}

/// One component of a pattern.
enum PatternPart {
    Literal(String),
    /// A pattern written by the user; a name equal to it is taken literally.
    LiteralOrWildcard(Pattern),
    Wildcard(Pattern),
    /// `**`
    AnyFolders,
}

/// A folder in which matching continues with part `at` of the pattern.
struct PendingFolder {
    folder: PathBuf,
    at: usize,
    through_link: bool,
}

struct Walk<'a> {
    root: &'a Path,
    parts: &'a [PatternPart],
    /// Device and inode of the store.
    store: Option<(u64, u64)>,
    store_excluded: bool,
    /// Visited real folders by device, inode and part of the pattern, each with the path of the visit.
    visited: HashMap<(u64, u64, usize), PathBuf>,
    names: usize,
    folders: Vec<PendingFolder>,
    /// Folders behind symlinks, by path; visited last, so that a folder is listed under its real name.
    links: BTreeMap<(PathBuf, usize), PendingFolder>,
    found: Vec<ListedFile>,
}

impl<'a> Walk<'a> {
    fn new(root: &'a Path, parts: &'a [PatternPart], store: Option<&Path>) -> Self {
        let identity = store.and_then(|store| fs::metadata(store).ok()).map(|m| (m.dev(), m.ino()));
        Self {
            root,
            parts,
            store: identity,
            store_excluded: false,
            visited: HashMap::new(),
            names: 0,
            folders: vec![PendingFolder { folder: root.to_owned(), at: 0, through_link: false }],
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

    fn visit(&mut self, step: &PendingFolder) -> Result<()> {
        let folder = &step.folder;
        let metadata = match fs::metadata(folder) {
            Ok(metadata) if metadata.is_dir() => metadata,
            // This folder lacks a literal part, or there is a file where the pattern expects a folder.
            Ok(_) => return Ok(()),
            Err(e) if is_not_found(&e) => return Ok(()),
            Err(e) => return Err(e).at(folder),
        };
        if self.store == Some((metadata.dev(), metadata.ino())) {
            self.store_excluded = true;
            return Ok(());
        }
        let first = self.visited.entry((metadata.dev(), metadata.ino(), step.at)).or_insert_with(|| folder.clone());
        if *first != *folder {
            self.push(folder.clone(), true, true);
            return Ok(());
        }
        match &self.parts[step.at] {
            PatternPart::Literal(name) => {
                let path = folder.join(name);
                match fs::symlink_metadata(&path) {
                    Ok(metadata) => self.match_name(step, path, metadata.file_type())?,
                    Err(e) if is_not_found(&e) => {}
                    Err(e) => return Err(e).at(&path),
                }
            }
            part @ (PatternPart::LiteralOrWildcard(pattern) | PatternPart::Wildcard(pattern)) => {
                let itself = folder.join(pattern.as_str());
                if let (PatternPart::LiteralOrWildcard(_), Ok(metadata)) = (part, fs::symlink_metadata(&itself)) {
                    return self.match_name(step, itself, metadata.file_type());
                }
                for (path, kind) in self.names_in(folder)? {
                    let name = path.file_name().unwrap_or_default().to_string_lossy();
                    if pattern.matches_with(&name, OPTIONS) {
                        self.match_name(step, path, kind)?;
                    }
                }
            }
            PatternPart::AnyFolders => {
                self.folders.push(PendingFolder {
                    folder: folder.clone(),
                    at: step.at + 1,
                    through_link: step.through_link,
                });
                for (path, kind) in self.names_in(folder)? {
                    let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
                    if !hidden && (kind.is_dir() || (kind.is_symlink() && path.is_dir())) {
                        self.descend(path, step.at, kind.is_symlink(), step.through_link);
                    }
                }
            }
        }
        Ok(())
    }

    /// Handles a name that matches the part of `step`: a file if it is the last part, else a folder in which to
    /// continue.
    fn match_name(&mut self, step: &PendingFolder, path: PathBuf, kind: FileType) -> Result<()> {
        if step.at + 1 < self.parts.len() {
            self.descend(path, step.at + 1, kind.is_symlink(), step.through_link);
            return Ok(());
        }
        let is_file = if kind.is_symlink() { target(&path)?.is_file() } else { kind.is_file() };
        if is_file {
            self.push(path, false, step.through_link || kind.is_symlink());
        }
        if self.found.len() > MAX_FILES {
            return Err(self.too_many(&format!("more than {MAX_FILES} files")));
        }
        Ok(())
    }

    fn descend(&mut self, folder: PathBuf, at: usize, is_link: bool, through_link: bool) {
        let step = PendingFolder { folder, at, through_link: through_link || is_link };
        if step.through_link {
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
                return Err(self.too_many(&format!("more than {MAX_NAMES} names to check")));
            }
            names.push((entry.path(), entry.file_type().at(folder)?));
        }
        Ok(names)
    }

    fn push(&mut self, path: PathBuf, is_repeat: bool, through_link: bool) {
        // Every path found lies below the root.
        let name = path.strip_prefix(self.root).unwrap_or(&path).to_owned();
        self.found.push(ListedFile { path, name, is_repeat, through_link });
    }

    fn too_many(&self, what: &str) -> Error {
        Error::user(format!("{}: {what}", self.root.display())).help("choose a smaller folder or a narrower pattern")
    }

    fn finish(mut self, listing: &mut Listing) {
        self.found.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        self.found.dedup_by(|a, b| a.path == b.path);
        listing.entries.append(&mut self.found);
        listing.store_excluded |= self.store_excluded;
    }
}

/// Whether the path does not exist, or is a link loop.
fn is_not_found(e: &std::io::Error) -> bool {
    let loops = e.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error());
    loops || matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory)
}

/// Metadata of the target of a link.
fn target(link: &Path) -> Result<Metadata> {
    fs::metadata(link).map_err(|e| {
        Error::user(format!("{}: the link has no target: {e}", link.display()))
            .help("repair or delete the link, or exclude it from the pattern")
    })
}

/// Marks every entry of a real file except the best one: the first without a symlink, else the first.
fn mark_repeats(entries: &mut [ListedFile]) {
    let mut real = HashSet::new();
    let mut order: Vec<usize> = (0..entries.len()).filter(|i| !entries[*i].is_repeat).collect();
    order.sort_by_key(|i| entries[*i].through_link);
    for i in order {
        let path = fs::canonicalize(&entries[i].path).unwrap_or_else(|_| entries[i].path.clone());
        entries[i].is_repeat = !real.insert(path);
    }
}

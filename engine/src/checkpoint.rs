//! Checkpoints of one key: decides when one is due, publishes it atomically, finds the latest valid one, deletes older
//! ones.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::context::{Cadence, Context, StepProgress, StopRequest};
use crate::disk;
use crate::error::{AtPath, Error, Result};
use crate::names::Digest;
use crate::store::{Platform, files};

/// Minimum time between two checkpoints under [`Cadence::Timed`].
const INTERVAL: Duration = Duration::from_secs(60);
/// Minimum time between two checkpoints as a multiple of the time that the last one took to write.
const MIN_COST_FACTOR: u32 = 20;

/// Version of the layout of a checkpoint's folder.
const LAYOUT_VERSION: u32 = 1;
const MANIFEST: &str = "checkpoint.json";
const PREFIX: &str = "checkpoint-";

/// Lists the other files of a checkpoint's folder; written after all of them.
#[derive(Serialize, Deserialize)]
struct CheckpointManifest {
    layout: u32,
    /// The kind's own format version for its files.
    format: u32,
    /// A kind's bytes may depend on the platform, so an attempt on another platform must not resume from this
    /// checkpoint.
    platform: Platform,
    files: BTreeMap<String, Digest>,
}

/// The checkpoints of one key. There are two on disk while a new one is being written.
pub struct Checkpoints {
    folder: PathBuf,
    format: u32,
    cadence: Cadence,
    stop: StopRequest,
    device: String,
    /// Steps since the last checkpoint.
    steps: u64,
    /// When the last checkpoint was written, and how long that took.
    last: Instant,
    write_time: Duration,
    /// Number of the newest checkpoint on disk; 0 if there is none.
    number: u64,
    /// Whether the last checkpoint could not be written.
    failing: bool,
}

impl Checkpoints {
    /// The checkpoints of the key that the attempt `ctx` belongs to. `format` is the version of the kind's checkpoint
    /// files; checkpoints of another format are ignored.
    pub fn new(ctx: &Context, format: u32) -> Self {
        ctx.stop.follow();
        Self {
            folder: ctx.checkpoints().to_owned(),
            format,
            cadence: ctx.cadence(),
            stop: ctx.stop.clone(),
            device: ctx.device.clone(),
            steps: 0,
            last: Instant::now(),
            write_time: Duration::ZERO,
            number: 0,
            failing: false,
        }
    }

    /// Calls `read` on the newest intact checkpoint and returns the result with the checkpoint's folder, which exists
    /// until the next checkpoint is published. `read` may reject a checkpoint and should have no side effects. An
    /// unusable checkpoint causes a warning, not an error.
    ///
    /// # Errors
    /// When the checkpoint folder cannot be listed.
    pub fn latest<T>(
        &mut self,
        ctx: &mut Context,
        mut read: impl FnMut(&Path) -> Result<T>,
    ) -> Result<Option<(T, PathBuf)>> {
        let mut found = self.list()?;
        found.sort_unstable();
        self.number = found.last().map_or(0, |(number, _)| *number);
        for (_, folder) in found.into_iter().rev() {
            match self.verify(&folder).and_then(|()| read(&folder)) {
                Ok(state) => return Ok(Some((state, folder))),
                Err(e) => ctx.warn(format!("ignoring a checkpoint: {}", e.message)),
            }
        }
        Ok(None)
    }

    /// Counts one more step and returns whether to write a checkpoint now.
    pub fn due(&mut self) -> bool {
        self.steps += 1;
        match self.cadence {
            _ if self.stop.is_requested() => true,
            Cadence::Steps(n) => self.steps >= n.get(),
            Cadence::Timed => self.last.elapsed() >= INTERVAL.max(self.write_time * MIN_COST_FACTOR),
        }
    }

    /// Publishes a checkpoint, which `fill` writes into an empty folder (files only), and deletes older ones. If that
    /// fails, the stage continues with a warning; consecutive failures cause only one warning.
    pub fn publish(&mut self, ctx: &mut Context, progress: StepProgress<'_>, fill: impl FnOnce(&Path) -> Result<()>) {
        let clock = Instant::now();
        let written = self.write(fill);
        self.write_time = clock.elapsed();
        self.last = Instant::now();
        self.steps = 0;
        match &written {
            Ok(()) => ctx.checkpointed(progress),
            Err(_) if self.failing => {}
            Err(e) => ctx.warn(format!("cannot write a checkpoint: {}", e.message)),
        }
        self.failing = written.is_err();
    }

    fn write(&mut self, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let target = self.folder.join(format!("{PREFIX}{}", self.number + 1));
        let fresh = files::temporary_name(&target);
        disk::create_dir(&fresh).at(&fresh)?;
        let temporary = files::TemporaryPath::new(fresh.clone());
        fill(&fresh)?;
        let mut names = BTreeMap::new();
        let mut paths = Vec::new();
        for entry in fs::read_dir(&fresh).at(&fresh)? {
            let entry = entry.at(&fresh)?;
            let (digest, _) = files::hash_file(&entry.path())?;
            names.insert(entry.file_name().to_string_lossy().into_owned(), digest);
            paths.push(entry.path());
        }
        let manifest = CheckpointManifest {
            layout: LAYOUT_VERSION,
            format: self.format,
            platform: Platform::with_device(&self.device),
            files: names,
        };
        let text = serde_json::to_vec_pretty(&manifest).expect("a manifest is plain data");
        let path = fresh.join(MANIFEST);
        disk::write(&path, text).at(&path)?;
        paths.push(path);
        files::sync_all(&paths)?;
        files::sync(&fresh)?;
        disk::rename(&fresh, &target).at(&target)?;
        temporary.keep();
        self.number += 1;
        files::sync(&self.folder)?;
        for (number, older) in self.list()? {
            if number != self.number {
                disk::remove_dir_all(&older).at(&older)?;
            }
        }
        Ok(())
    }

    /// All checkpoints with their numbers, unordered; deletes those that an attempt left half written.
    fn list(&self) -> Result<Vec<(u64, PathBuf)>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.folder).at(&self.folder)? {
            let entry = entry.at(&self.folder)?;
            let name = entry.file_name();
            if files::is_temporary_name(&name) {
                // Attempts of one key never overlap, so no process is writing it.
                disk::remove_dir_all(&entry.path()).at(entry.path())?;
            } else if let Some(number) = name.to_str().and_then(|n| n.strip_prefix(PREFIX)?.parse().ok()) {
                found.push((number, entry.path()));
            }
        }
        Ok(found)
    }

    /// Checks that every file is present and undamaged, in the expected format, and from this platform.
    fn verify(&self, folder: &Path) -> Result<()> {
        let path = folder.join(MANIFEST);
        let bad = |what: String| Error::environment(format!("{}: {what}", path.display()));
        let text = fs::read(&path).at(&path)?;
        let manifest: CheckpointManifest =
            serde_json::from_slice(&text).map_err(|e| bad(format!("not readable: {e}")))?;
        let (is, expected) = ((manifest.layout, manifest.format), (LAYOUT_VERSION, self.format));
        if is != expected {
            return Err(bad(format!(
                "has format {}.{}, but this program writes {}.{}",
                is.0, is.1, expected.0, expected.1
            )));
        }
        let here = Platform::with_device(&self.device);
        if manifest.platform != here {
            return Err(bad(format!("written on {:?}, but this is {here:?}", manifest.platform)));
        }
        for (name, digest) in &manifest.files {
            let path = folder.join(name);
            if files::hash_file(&path)?.0 != *digest {
                return Err(bad(format!("`{name}` is damaged or truncated")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::context::StageEvent;

    /// A checkpoint folder, and the events of attempts that use it.
    struct Fixture {
        folder: tempfile::TempDir,
        events: Arc<Mutex<Vec<StageEvent>>>,
    }

    const PROGRESS: StepProgress<'static> = StepProgress { done: 3, total: 9, unit: "steps" };

    impl Fixture {
        fn new() -> Self {
            Self { folder: tempfile::tempdir().unwrap(), events: Arc::default() }
        }

        fn ctx(&self) -> Context {
            let (events, folder) = (self.events.clone(), self.folder.path().to_owned());
            Context::new("kind", 0, BTreeMap::new(), PathBuf::new(), folder)
                .with_sink(move |event| events.lock().unwrap().push(event))
        }

        fn publish(&self, text: &str) {
            let mut ctx = self.ctx();
            let mut checkpoints = Checkpoints::new(&ctx, 1);
            checkpoints.latest(&mut ctx, |_| Ok(())).unwrap();
            checkpoints.publish(&mut ctx, PROGRESS, |folder| fs::write(folder.join("text"), text).at(folder));
        }

        fn found(&self, format: u32) -> Option<String> {
            let mut ctx = self.ctx();
            let read = |folder: &Path| fs::read_to_string(folder.join("text")).at(folder);
            Checkpoints::new(&ctx, format).latest(&mut ctx, read).unwrap().map(|(text, _)| text)
        }

        fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(self.folder.path()).unwrap();
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
        }

        fn warnings(&self) -> Vec<String> {
            let warning = |event: &StageEvent| match event {
                StageEvent::Warning { message } => Some(message.clone()),
                _ => None,
            };
            self.events.lock().unwrap().iter().filter_map(warning).collect()
        }
    }

    #[test]
    fn the_last_checkpoint_is_found_and_the_older_one_is_removed() {
        let fixture = Fixture::new();
        assert_eq!(fixture.found(1), None);
        fixture.publish("one");
        fixture.publish("two");
        assert_eq!((fixture.found(1).as_deref(), fixture.names()), (Some("two"), vec!["checkpoint-2".to_owned()]));
        assert!(fixture.warnings().is_empty());
        let is_checkpoint =
            |event: &StageEvent| matches!(event, StageEvent::Checkpoint { done: 3, total: 9, unit } if unit == "steps");
        assert_eq!(fixture.events.lock().unwrap().iter().filter(|event| is_checkpoint(event)).count(), 2);
    }

    #[test]
    fn a_damaged_truncated_or_differently_formatted_checkpoint_is_reported_and_not_used() {
        for spoil in ["text", MANIFEST] {
            let fixture = Fixture::new();
            fixture.publish("whole");
            let file = fixture.folder.path().join("checkpoint-1").join(spoil);
            let bytes = fs::read(&file).unwrap();
            fs::write(&file, &bytes[..bytes.len() - 2]).unwrap();
            assert_eq!(fixture.found(1), None);
            assert_eq!(fixture.warnings().len(), 1);
            assert!(fixture.warnings()[0].starts_with("ignoring a checkpoint: "), "{:?}", fixture.warnings());
            fixture.publish("next");
            assert_eq!((fixture.found(1).as_deref(), fixture.names()), (Some("next"), vec!["checkpoint-2".to_owned()]));
        }
        let fixture = Fixture::new();
        fixture.publish("whole");
        assert_eq!(fixture.found(2), None);
        assert!(fixture.warnings()[0].contains("format 1.1, but this program writes 1.2"), "{:?}", fixture.warnings());
    }

    #[test]
    fn a_checkpoint_of_another_platform_is_not_used() {
        let fixture = Fixture::new();
        fixture.publish("whole");
        let path = fixture.folder.path().join("checkpoint-1").join(MANIFEST);
        let mut manifest: CheckpointManifest = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        manifest.platform.instructions = "other".into();
        fs::write(&path, serde_json::to_vec(&manifest).unwrap()).unwrap();
        assert_eq!(fixture.found(1), None);
    }

    #[test]
    fn partial_or_duplicate_files_left_by_a_crash_do_no_harm() {
        let fixture = Fixture::new();
        fixture.publish("one");
        let half = fixture.folder.path().join(".new-1-2-3");
        fs::create_dir(&half).unwrap();
        fs::write(half.join("text"), "tw").unwrap();
        assert_eq!((fixture.found(1).as_deref(), half.exists()), (Some("one"), false));
        // As if killed between the rename and the deletion of the older checkpoint.
        let (one, two) = (fixture.folder.path().join("checkpoint-1"), fixture.folder.path().join("checkpoint-2"));
        fs::create_dir(&two).unwrap();
        for name in ["text", MANIFEST] {
            fs::copy(one.join(name), two.join(name)).unwrap();
        }
        fs::write(one.join("text"), "old").unwrap();
        assert_eq!(fixture.found(1).as_deref(), Some("one"));
        assert!(fixture.warnings().is_empty());
    }

    #[test]
    fn a_checkpoint_that_cannot_be_written_is_reported_once_and_the_last_one_stays() {
        let fixture = Fixture::new();
        fixture.publish("one");
        let mut ctx = fixture.ctx();
        let mut checkpoints = Checkpoints::new(&ctx, 1);
        checkpoints.latest(&mut ctx, |_| Ok(())).unwrap();
        for _ in 0..2 {
            checkpoints.publish(&mut ctx, PROGRESS, |_| Err(Error::environment("disk full")));
        }
        assert_eq!(fixture.warnings(), ["cannot write a checkpoint: disk full"]);
        assert_eq!((fixture.found(1).as_deref(), fixture.names().len()), (Some("one"), 1));
    }

    #[test]
    fn a_checkpoint_is_due_at_the_set_interval_of_steps() {
        let fixture = Fixture::new();
        let mut ctx = fixture.ctx().with_cadence(Cadence::Steps(NonZeroU64::new(2).unwrap()));
        let mut checkpoints = Checkpoints::new(&ctx, 1);
        let mut due = || {
            let due = checkpoints.due();
            if due {
                checkpoints.publish(&mut ctx, PROGRESS, |_| Ok(()));
            }
            due
        };
        assert_eq!([due(), due(), due(), due(), due()], [false, true, false, true, false]);
        assert!(!Checkpoints::new(&fixture.ctx(), 1).due(), "a minute has not gone by");
    }
}

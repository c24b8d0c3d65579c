//! Locates an existing model, and selects its files.

use std::path::{Path, PathBuf};

use engine::context::Context;
use engine::error::{AtPath, Error, Result};

use crate::error::IntoStageResult;
use crate::hub::{Hub, HubId, Repo};
use crate::types::Model;

/// The name that transformers gives to pickled weights.
const PICKLE: &str = "pytorch_model.bin";

/// A Hugging Face folder, local or on the hub.
pub struct Source {
    /// Name of the source for messages.
    pub name: String,
    /// The folder that contains the files once they are fetched.
    pub here: PathBuf,
    hub: Option<Hub>,
}

/// The files of a model's weights: one file, or an index and its shards.
pub struct Weights {
    pub files: Vec<String>,
    /// Whether the weights are PyTorch pickles instead of safetensors.
    pub pickled: bool,
}

impl Source {
    pub fn folder(folder: &Path) -> Self {
        let name = folder.display().to_string().trim_end_matches('/').to_owned();
        Self { name, here: folder.to_owned(), hub: None }
    }

    /// # Errors
    /// Same as [`Hub::open`].
    pub fn hub(id: &HubId, ctx: &mut Context) -> Result<Self> {
        let hub = Hub::open(Repo::Model, id, ctx)?;
        Ok(Self { name: id.id.clone(), here: hub.folder(), hub: Some(hub) })
    }

    pub fn has(&self, file: &str) -> bool {
        self.hub.as_ref().map_or_else(|| self.here.join(file).is_file(), |hub| hub.has(file))
    }

    /// Fetches files into `here`.
    ///
    /// # Errors
    /// Names the file that is missing or cannot be fetched.
    pub fn fetch(&self, files: &[String], ctx: &mut Context) -> Result<()> {
        if let Some(file) = files.iter().find(|file| !self.has(file)) {
            return Err(self.missing(file));
        }
        self.hub.as_ref().map_or(Ok(()), |hub| hub.fetch_all(files, ctx).map(drop))
    }

    fn missing(&self, file: &str) -> Error {
        Error::user(format!("{}: file `{file}` is missing", self.name)).help(format!(
            "a model is config.json, tokenizer.json and its weights: {} or {PICKLE}, whole or in shards with their index",
            Model::WEIGHTS
        ))
    }

    /// Puts a fetched file into the artifact. A file outside the store may change later, so it is copied, never linked.
    ///
    /// # Errors
    /// If it cannot be read or written.
    pub fn put(&self, file: &str, ctx: &Context) -> Result<()> {
        let from = self.here.join(file);
        match self.hub {
            Some(_) => ctx.link_or_copy(&from, file),
            None => std::fs::copy(&from, ctx.out().join(file)).at(&from).map(drop),
        }
    }

    /// The weight files: safetensors if there are any, otherwise pickles, never both. Fetches an index to read it.
    ///
    /// # Errors
    /// If there are no weights, or if an index names a file with a path.
    pub fn weights(&self, ctx: &mut Context) -> Result<Weights> {
        for whole in [Model::WEIGHTS, PICKLE] {
            let pickled = whole == PICKLE;
            if self.has(whole) {
                return Ok(Weights { files: vec![whole.to_owned()], pickled });
            }
            let index = format!("{whole}.index.json");
            if self.has(&index) {
                self.fetch(std::slice::from_ref(&index), ctx)?;
                let shards = lm::io::shards(&self.here.join(&index)).into_stage_result()?;
                return Ok(Weights { files: std::iter::once(index).chain(shards).collect(), pickled });
            }
        }
        Err(self.missing(Model::WEIGHTS))
    }
}

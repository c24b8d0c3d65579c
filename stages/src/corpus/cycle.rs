//! Iterates over the posts of a split repeatedly.

use std::path::{Path, PathBuf};

use engine::error::{Error, Result};

use crate::table::Reader;
use crate::types::{Post, Posts, Split};

/// Repeated passes over a table of posts, one post at a time; memory does not grow with its rows.
pub(crate) struct PostCycle {
    folder: PathBuf,
    split: Option<Split>,
    reader: Reader<Post>,
    round: u64,
    found: bool,
}

impl PostCycle {
    /// Selects the posts of `split`; without one, every post that is neither in `valid` nor in `calibration`.
    pub fn open(folder: &Path, split: Option<Split>) -> Result<Self> {
        Ok(Self { folder: folder.to_owned(), split, reader: Posts::open(folder)?, round: 0, found: false })
    }

    /// The next post, and the number of completed passes over the table.
    ///
    /// # Errors
    /// If no post is in the split, or the table cannot be read.
    pub fn next(&mut self) -> Result<(u64, Post)> {
        loop {
            match self.reader.next().transpose()? {
                Some(post) if self.takes(&post) => {
                    self.found = true;
                    return Ok((self.round, post));
                }
                Some(_) => {}
                None if self.found => {
                    self.reader = Posts::open(&self.folder)?;
                    self.round += 1;
                }
                None => return Err(self.nothing()),
            }
        }
    }

    fn takes(&self, post: &Post) -> bool {
        match self.split {
            Some(split) => post.is_in(split),
            None => !post.is_in(Split::Valid) && !post.is_in(Split::Calibration),
        }
    }

    fn nothing(&self) -> Error {
        match self.split {
            Some(split) => Error::user(format!("no posts in split `{split}`"))
                .help("posts get their splits from `dataset.filter`; `split: null` takes every post outside valid and calibration"),
            None => Error::user("no posts outside valid and calibration"),
        }
    }
}

/// A fault if `split` is held out: posts used for measurement must not be used for training.
pub(crate) fn fault(split: Option<Split>) -> Option<(String, String)> {
    matches!(split, Some(Split::Valid | Split::Calibration))
        .then(|| ("split".to_owned(), "posts in valid and calibration are held out; take another split".to_owned()))
}

//! Addresses of remote stores, and the connection to them. Credentials come from the environment only.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use object_store::ObjectStore;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::http::HttpBuilder;
use object_store::local::LocalFileSystem;
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, ClientConfigKey, RetryConfig};
use url::Url;

use crate::error::{Error, Result};
use crate::run::redact::Secrets;
use crate::store::{Store, files};

const S3: [&str; 2] = ["s3", "s3a"];
const GOOGLE: [&str; 1] = ["gs"];
const AZURE: [&str; 5] = ["az", "azure", "adl", "abfs", "abfss"];
const HTTP: [&str; 2] = ["http", "https"];

/// Where a remote store is. Holds no credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Folder(PathBuf),
    Url(Url),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(path) => write!(f, "{}", path.display()),
            Self::Url(url) => f.write_str(url.as_str()),
        }
    }
}

impl Address {
    /// Parses a URL, or the path of a folder relative to `base`.
    ///
    /// # Errors
    /// A user error, which does not repeat credentials.
    pub fn parse(text: &str, base: &Path) -> Result<Self> {
        if text.is_empty() {
            return Err(Error::user("the address of a remote is empty").help(FORMS));
        }
        if !text.contains("://") {
            return Ok(Self::Folder(base.join(text)));
        }
        let (scheme, _) = text.split_once("://").unwrap_or_default();
        let url = Url::parse(text)
            .map_err(|e| Error::user(format!("a remote at `{scheme}://…`: not a URL: {e}")).help(FORMS))?;
        if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
            return Err(Error::user(format!(
                "a remote at `{scheme}://…`: the URL must not contain a user, password, query or fragment"
            ))
            .help("set credentials in the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"));
        }
        let scheme = url.scheme();
        if scheme == "file" {
            let path = url.to_file_path().ok();
            return path
                .map(Self::Folder)
                .ok_or_else(|| Error::user(format!("{url}: not a path of this machine")).help("write file:///PATH"));
        }
        if ![&S3[..], &GOOGLE, &AZURE, &HTTP].concat().contains(&scheme) {
            return Err(Error::user(format!("{url}: the scheme `{scheme}` is not supported")).help(FORMS));
        }
        match url.host_str() {
            Some(host) if !host.is_empty() => Ok(Self::Url(url)),
            _ => Err(Error::user(format!("{url}: the bucket or host is missing")).help(FORMS)),
        }
    }

    /// Whether results can be uploaded, by the address alone. Not over HTTP, which has no reliable conditional create.
    pub fn can_write(&self) -> bool {
        match self {
            Self::Folder(path) => files::is_writable(path),
            Self::Url(url) => !HTTP.contains(&url.scheme()),
        }
    }

    /// Creates the folder, if this is one and its parent exists.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn create(&self) -> Result<()> {
        match self {
            Self::Folder(path) if !path.is_dir() => std::fs::create_dir(path)
                .map_err(|e| Error::environment(format!("{}: cannot create the folder: {e}", path.display()))),
            _ => Ok(()),
        }
    }

    /// Refuses a folder that is a local store, or lies in or around this one.
    pub(super) fn check_against(&self, store: &Store) -> Result<()> {
        let Self::Folder(path) = self else { return Ok(()) };
        let (Ok(path), Ok(root)) = (path.canonicalize(), store.root().canonicalize()) else { return Ok(()) };
        let is_store = path.join("version").is_file() && path.join("artifacts").is_dir();
        if is_store || path.starts_with(&root) || root.starts_with(&path) {
            return Err(Error::user(format!(
                "{}: a remote cannot be a local store or overlap with one",
                path.display()
            ))
            .help("choose another folder"));
        }
        Ok(())
    }

    pub(super) fn connect(&self) -> Result<Arc<dyn ObjectStore>> {
        // Fails only if a provider is already installed.
        let _ = rustls::crypto::ring::default_provider().install_default();
        match self {
            Self::Folder(path) => {
                let folder = LocalFileSystem::new_with_prefix(path).map_err(|_| {
                    Error::environment(format!("{}: the folder does not exist", path.display()))
                        .help("create it, or let `temper push` create it")
                })?;
                Ok(Arc::new(folder.with_fsync(true)))
            }
            Self::Url(url) => self.connect_to(url).map_err(|e| {
                Error::environment(secrets().redact(&format!("{url}: {e}")))
                    .help("check the credentials in the environment; see docs/remote.md")
            }),
        }
    }

    fn connect_to(&self, url: &Url) -> object_store::Result<Arc<dyn ObjectStore>> {
        let retry = RetryConfig {
            backoff: BackoffConfig { init_backoff: std::time::Duration::from_millis(100), ..BackoffConfig::default() },
            max_retries: 2,
            retry_timeout: std::time::Duration::from_secs(30),
        };
        // For a whole request. A slower transfer is interrupted, and resumes where it stopped.
        let (key, limit) = (ClientConfigKey::Timeout, "300s");
        let prefix = object_store::path::Path::from_url_path(url.path())?;
        let bucket = url.host_str().unwrap_or_default();
        let scheme = url.scheme();
        let store: Arc<dyn ObjectStore> = if S3.contains(&scheme) {
            let builder = AmazonS3Builder::from_env().with_bucket_name(bucket).with_retry(retry);
            Arc::new(builder.with_config(AmazonS3ConfigKey::Client(key), limit).build()?)
        } else if GOOGLE.contains(&scheme) {
            let builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket).with_retry(retry);
            Arc::new(builder.with_config(GoogleConfigKey::Client(key), limit).build()?)
        } else if AZURE.contains(&scheme) {
            let builder = MicrosoftAzureBuilder::from_env().with_container_name(bucket).with_retry(retry);
            Arc::new(builder.with_config(AzureConfigKey::Client(key), limit).build()?)
        } else {
            let builder = HttpBuilder::new().with_url(url.as_str()).with_retry(retry);
            let plain = (scheme == "http").to_string();
            return Ok(Arc::new(
                builder.with_config(key, limit).with_config(ClientConfigKey::AllowHttp, plain).build()?,
            ));
        };
        Ok(Arc::new(PrefixStore::new(store, prefix)))
    }
}

const FORMS: &str = "write the path of a folder, file:///PATH, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, \
                     az://CONTAINER/PREFIX, or https://HOST/PATH (read-only)";

/// The credentials in the environment, which errors must not show.
pub(super) fn secrets() -> Secrets {
    let owners = ["AWS_", "AZURE_", "GOOGLE_"];
    let words = ["KEY", "SECRET", "TOKEN", "PASSWORD", "SAS", "CREDENTIAL"];
    let is_secret =
        |name: &str| owners.iter().any(|owner| name.starts_with(owner)) && words.iter().any(|word| name.contains(word));
    let values = std::env::vars_os().filter_map(|(name, value)| {
        let secret = name.to_str().is_some_and(is_secret);
        secret.then(|| value.to_string_lossy().into_owned())
    });
    Secrets::new(values)
}

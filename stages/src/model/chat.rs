//! Chat templates: a model's own Jinja template, rendered around messages that it never sees.
//!
//! Templates come with models and messages hold texts by strangers, so neither is trusted. A template reads no file and no
//! clock and has bounded work. It is rendered with a marker in place of each message, so that the text of a message is
//! never taken for markup: [`lm::MarkupTokenizer`] encodes the two apart.

use std::path::{Path, PathBuf};

use engine::error::{AtPath, Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value, context};
use serde::Deserialize;

use crate::error::IntoStageResult;
use crate::table::cut;
use crate::text::clean::printable;
use crate::types::Model;
use crate::types::folder::read_json;

/// Instructions that a template may take; those of known models take fewer than 100 per message.
const FUEL: u64 = 10_000;
/// Longest template and longest text that it may render to, in bytes; those of known models have fewer than 10,000.
const MAX_TEXT: usize = 128 << 10;
/// Largest file of a template, in bytes. Some tokenizer_config.json list tens of thousands of tokens.
const MAX_BYTES: u64 = 32 << 20;
/// Begins the text that stands for a message; ends with its number and `X`. Letters, so that no filter changes it.
const MARKER: &str = "TEMPERMESSAGE";
/// The date given to templates, so that equal inputs give equal prompts: that of Llama 3's templates without a clock.
const DATE: (i32, u32, u32) = (2024, 7, 26);

/// A piece of a rendered conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChatPiece {
    /// Text of the template.
    Markup(String),
    /// The message with this index.
    Message(usize),
}

/// A chat template.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    bos: Option<String>,
    eos: Option<String>,
    /// The file that holds it.
    path: PathBuf,
}

/// The fields of `tokenizer_config.json` that concern templates.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    #[serde(default)]
    chat_template: Option<Templates>,
    #[serde(default)]
    bos_token: Option<Token>,
    #[serde(default)]
    eos_token: Option<Token>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a chat template, or a list of named ones")]
enum Templates {
    One(String),
    Named(Vec<Named>),
}

#[derive(Deserialize)]
struct Named {
    name: String,
    template: String,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a token")]
enum Token {
    Text(String),
    Described { content: String },
}

impl Token {
    fn text(self) -> String {
        match self {
            Self::Text(text) | Self::Described { content: text } => text,
        }
    }
}

impl ChatTemplate {
    /// Whether a model has a chat template.
    ///
    /// # Errors
    /// As [`ChatTemplate::of_model`].
    pub fn is_in(model: &Path) -> Result<bool> {
        Ok(Self::of_model(model)?.is_some())
    }

    /// The chat template of a model: a Model folder or a GGUF file.
    ///
    /// # Errors
    /// If a file cannot be read, or has another form.
    pub fn of_model(model: &Path) -> Result<Option<Self>> {
        let file = model.join(Model::CHAT_TEMPLATE);
        if file.is_file() {
            return Self::of_file(&file, model).map(Some);
        }
        let path = if model.is_file() { model.to_owned() } else { model.join(Model::TOKENIZER_CONFIG) };
        Self::of_config(config(model)?, &path)
    }

    /// The chat template in a file: a `tokenizer_config.json`, or else the template itself. The model names the tokens that
    /// the template may use, unless the file does.
    ///
    /// # Errors
    /// If the file cannot be read, or holds no template.
    pub fn of_file(file: &Path, model: &Path) -> Result<Self> {
        check_size(file)?;
        if file.extension().is_some_and(|end| end == "json") {
            let own: TokenizerConfig = read_json(file)?;
            let tokens = match own {
                TokenizerConfig { bos_token: None, eos_token: None, .. } => config(model)?,
                _ => TokenizerConfig::default(),
            };
            let (bos_token, eos_token) = (own.bos_token.or(tokens.bos_token), own.eos_token.or(tokens.eos_token));
            return Self::of_config(TokenizerConfig { bos_token, eos_token, ..own }, file)?
                .ok_or_else(|| Error::user(format!("{}: has no field `chat_template`", file.display())));
        }
        let source = engine::text::read(file).at(file)?;
        Ok(Self::new(source, config(model)?, file))
    }

    /// The template among the fields of the `tokenizer_config.json`, or of the GGUF file, at `path`.
    fn of_config(mut config: TokenizerConfig, path: &Path) -> Result<Option<Self>> {
        let source = match config.chat_template.take() {
            None => return Ok(None),
            Some(Templates::One(source)) => source,
            Some(Templates::Named(named)) => {
                let names: Vec<String> =
                    named.iter().map(|one| format!("`{}`", cut(&printable(&one.name), 40))).collect();
                let default = named.into_iter().find(|one| one.name == "default");
                let missing =
                    || format!("{}: has no chat template `default`, only {}", path.display(), names.join(", "));
                default.ok_or_else(|| Error::user(missing()))?.template
            }
        };
        Ok(Some(Self::new(source, config, path)))
    }

    fn new(source: String, config: TokenizerConfig, path: &Path) -> Self {
        let [bos, eos] = [config.bos_token, config.eos_token].map(|token| token.map(Token::text));
        Self { source, bos, eos, path: path.to_owned() }
    }

    /// Renders a conversation with messages of these roles and the beginning of the assistant's next turn. Each message is
    /// in the result once, in order.
    ///
    /// # Errors
    /// If the template is invalid, refuses the conversation, does too much, or does not show each message once and in
    /// order.
    pub fn render(&self, roles: &[&str]) -> Result<Vec<ChatPiece>> {
        let too_long = |what: &str| {
            let path = self.path.display();
            let error = Error::user(format!("{path}: the chat template {what} more than {MAX_TEXT} bytes"));
            Err(error.help("use `prompt: plain`, or another template by `chat_template`"))
        };
        if self.source.len() > MAX_TEXT {
            return too_long("has");
        }
        let rendered = self.rendered(roles).map_err(|e| self.error(&e))?;
        if rendered.len() > MAX_TEXT {
            return too_long("renders to");
        }
        let apart = || {
            let what = format!("{}: the chat template does not show each message once, in order", self.path.display());
            Error::user(what).help("use `prompt: plain`, or another template by `chat_template`")
        };
        if rendered.matches(MARKER).count() != roles.len() {
            return Err(apart());
        }
        let mut pieces = Vec::with_capacity(2 * roles.len() + 1);
        let mut rest = rendered.as_str();
        for i in 0..roles.len() {
            let (before, after) = rest.split_once(&marker(i)).ok_or_else(apart)?;
            pieces.extend([ChatPiece::Markup(before.to_owned()), ChatPiece::Message(i)]);
            rest = after;
        }
        pieces.push(ChatPiece::Markup(rest.to_owned()));
        pieces.retain(|piece| *piece != ChatPiece::Markup(String::new()));
        Ok(pieces)
    }

    fn rendered(&self, roles: &[&str]) -> Result<String, minijinja::Error> {
        let mut environment = Environment::new();
        // As transformers renders them.
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.set_fuel(Some(FUEL));
        let message = |(i, role): (usize, &&str)| context! { role => *role, content => marker(i) };
        let messages: Vec<Value> = roles.iter().enumerate().map(message).collect();
        let context = context! {
            messages => messages,
            add_generation_prompt => true,
            // The answer is read where the turn begins, so there is no place for thoughts.
            enable_thinking => false,
            tools => (),
            documents => (),
            ..self.tokens()
        };
        environment.template_from_str(&self.source)?.render(context)
    }

    /// The tokens that the model has; a template may ask whether they are defined.
    fn tokens(&self) -> Value {
        let tokens = [("bos_token", &self.bos), ("eos_token", &self.eos)];
        Value::from_pairs(
            tokens.into_iter().filter_map(|(name, token)| Some((name, Value::from(token.as_ref()?.as_str())))),
        )
    }

    fn error(&self, error: &minijinja::Error) -> Error {
        let at = error.line().map_or_else(String::new, |line| format!(", line {line} of the chat template"));
        let what = match error.kind() {
            ErrorKind::OutOfFuel => "it does too much".to_owned(),
            _ => match error.detail() {
                Some(detail) => format!("{}: {}", error.kind(), cut(&printable(detail), 300)),
                None => error.kind().to_string(),
            },
        };
        Error::user(format!("{}{at}: {what}", self.path.display()))
            .help("use `prompt: plain`, or another template by `chat_template`")
    }
}

fn marker(message: usize) -> String {
    format!("{MARKER}{message}X")
}

/// The fields of a model's `tokenizer_config.json`, or of its GGUF file; empty if a folder has no such file.
fn config(model: &Path) -> Result<TokenizerConfig> {
    if model.is_file() {
        let fields = lm::io::gguf_chat_config(model).into_stage_result()?;
        return serde_json::from_value(fields).map_err(|e| Error::internal(e.to_string()));
    }
    let path = model.join(Model::TOKENIZER_CONFIG);
    if !path.is_file() {
        return Ok(TokenizerConfig::default());
    }
    check_size(&path)?;
    read_json(&path)
}

fn check_size(path: &Path) -> Result<()> {
    let bytes = std::fs::metadata(path).at(path)?.len();
    if bytes > MAX_BYTES {
        return Err(Error::user(format!("{}: has {bytes} bytes, expected at most {MAX_BYTES}", path.display())));
    }
    Ok(())
}

fn raise_exception(message: &str) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(
        ErrorKind::InvalidOperation,
        format!("the template refuses this conversation: {message}"),
    ))
}

fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    use std::fmt::Write as _;
    let (year, month, day) = DATE;
    let date = chrono::NaiveDate::from_ymd_opt(year, month, day).and_then(|date| date.and_hms_opt(0, 0, 0));
    let mut text = String::new();
    let invalid =
        || minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: unknown format `{format}`"));
    let date = date.ok_or_else(invalid)?;
    write!(text, "{}", date.format(format)).map_err(|_| invalid())?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::toys::CHATML;

    fn template(source: &str) -> ChatTemplate {
        let config = TokenizerConfig { bos_token: Some(Token::Text("<s>".into())), ..TokenizerConfig::default() };
        ChatTemplate::new(source.to_owned(), config, Path::new("chat_template.jinja"))
    }

    /// The rendered text with messages as `[role number]`.
    fn text(source: &str, roles: &[&str]) -> Result<String> {
        let pieces = template(source).render(roles)?;
        Ok(pieces
            .into_iter()
            .map(|piece| match piece {
                ChatPiece::Markup(text) => text,
                ChatPiece::Message(i) => format!("[{i}]"),
            })
            .collect())
    }

    #[test]
    fn templates_of_known_models_render_as_in_transformers() {
        let llama = "{{- bos_token }}{%- set date_string = strftime_now('%d %b %Y') if strftime_now is defined else 'x' %}
{%- if tools is not none %}{{ 'tools' }}{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}{{- date_string }}";
        let gemma = "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
    {%- if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\n' + message['content'].strip() + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}";
        let qwen3 = "{%- for message in messages %}{%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}";
        for (source, expected) in [
            (CHATML, "<|im_start|>user\n[0]<|im_end|>\n<|im_start|>assistant\n[1]<|im_end|>\n<|im_start|>assistant\n"),
            (
                llama,
                "<s><|start_header_id|>user<|end_header_id|>\n\n[0]<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[1]\
                 <|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n26 Jul 2024",
            ),
            (
                gemma,
                "<s><start_of_turn>user\n[0]<end_of_turn>\n<start_of_turn>model\n[1]<end_of_turn>\n<start_of_turn>model\n",
            ),
            (
                qwen3,
                "<|im_start|>user\n[0]<|im_end|>\n<|im_start|>assistant\n[1]<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
            ),
        ] {
            assert_eq!(text(source, &["user", "assistant"]).unwrap(), expected);
        }
    }

    #[test]
    fn a_template_that_cannot_be_used_says_why() {
        for (source, told) in [
            (
                "{{ raise_exception('roles must alternate') }}",
                "the template refuses this conversation: roles must alternate",
            ),
            ("{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}", "it does too much"),
            ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not show each message once"),
            ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "does not show each message once"),
            ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "does not show each message once"),
            ("{% include '/etc/passwd' %}", "line 1 of the chat template"),
            ("{% if %}", "line 1 of the chat template"),
            ("{{ 'x' * 200000 }}", "renders to more than"),
            (&"{{ 'x' }}".repeat(20_000), "has more than"),
            ("{{ messages[0].content.explode() }}", "explode"),
        ] {
            let error = text(source, &["user", "assistant"]).unwrap_err();
            assert!(error.message.contains(told) && error.exit_code() == 2, "{source}: {error}");
            assert!(error.help.is_some_and(|help| help.contains("prompt: plain")), "{source}");
        }
    }

    #[test]
    fn a_template_is_found_in_each_of_its_files() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let found = || ChatTemplate::of_model(folder.path());
        assert!(found().unwrap().is_none());
        let config = |template: serde_json::Value| {
            let config = json!({ "bos_token": { "content": "<s>", "lstrip": false }, "eos_token": null, "chat_template": template });
            std::fs::write(at("tokenizer_config.json"), config.to_string()).unwrap();
        };
        config(serde_json::Value::Null);
        assert!(found().unwrap().is_none());
        config(json!([{ "name": "tool_use", "template": "x" }]));
        assert!(found().unwrap_err().message.contains("no chat template `default`, only `tool_use`"));
        config(json!([{ "name": "tool_use", "template": "x" }, { "name": "default", "template": CHATML }]));
        assert_eq!(found().unwrap().unwrap().source, CHATML);
        config(json!(CHATML));
        let template = found().unwrap().unwrap();
        assert_eq!(
            (template.source.as_str(), template.bos.as_deref(), template.eos.as_deref()),
            (CHATML, Some("<s>"), None)
        );
        // A file of its own comes first, with the tokens of the other one.
        std::fs::write(at("chat_template.jinja"), "{{ bos_token }}").unwrap();
        let template = found().unwrap().unwrap();
        assert_eq!((template.source.as_str(), template.bos.as_deref()), ("{{ bos_token }}", Some("<s>")));
        std::fs::write(at("other.json"), "{}").unwrap();
        assert!(
            ChatTemplate::of_file(&at("other.json"), folder.path())
                .unwrap_err()
                .message
                .contains("no field `chat_template`")
        );
    }
}

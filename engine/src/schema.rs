//! The JSON schema of a pipeline file, built from the kinds' parameter types.

use serde_json::{Map, Value, json};

use crate::describe::describe;
use crate::kind::{AnyKind, Arity, Registry};

/// For `temper schema` and editors: lets them complete keys, kinds, parameters and ports, and mark errors.
pub fn schema(registry: &Registry) -> Value {
    let names: Vec<&str> = registry.kinds().map(AnyKind::name).collect();
    let mut definitions = shared(&names);
    definitions.insert("stage".into(), json!({ "oneOf": registry.kinds().map(stage).collect::<Vec<_>>() }));
    for kind in registry.kinds() {
        definitions.insert(definition(kind), parameters(kind));
    }
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "temper pipeline",
        "type": "object",
        "required": ["version", "stages"],
        "additionalProperties": false,
        "properties": {
            "version": { "const": 1, "description": "Version of this format." },
            "seed": with_description(&reference("seed"), "Default seed of the stages; 0 if absent."),
            "targets": with_description(&reference("selectors"), "Stages to run. If absent: every stage that no other stage needs."),
            "stages": {
                "type": "object",
                "description": "Stages by name.",
                "propertyNames": reference("name"),
                "additionalProperties": reference("stage"),
            },
            "profiles": {
                "type": "object",
                "description": "Changes by name: maps are merged, null deletes a key, and a stage with `uses` replaces the whole stage.",
                "propertyNames": reference("name"),
                "additionalProperties": reference("profile"),
            },
            "report": with_description(&reference("report"), "Settings of the report."),
            "remote": reference("remote"),
            "on_finish": reference("command"),
            "executors": reference("executors"),
            "pools": reference("pools"),
        },
        "$defs": definitions,
    })
}

fn definition(kind: &dyn AnyKind) -> String {
    format!("kind:{}", kind.name())
}

fn reference(name: &str) -> Value {
    json!({ "$ref": format!("#/$defs/{name}") })
}

fn with_description(schema: &Value, description: &str) -> Value {
    let mut schema = schema.clone();
    schema["description"] = description.into();
    schema
}

/// Definitions that the stages of all kinds share.
fn shared(kinds: &[&str]) -> Map<String, Value> {
    let parts = || {
        json!({
            "with": { "type": ["object", "null"] },
            "needs": { "type": ["object", "null"], "additionalProperties": { "anyOf": [reference("selectors"), { "type": "null" }] } },
            "seed": { "anyOf": [reference("seed"), { "type": "null" }] },
        })
    };
    let label = json!({ "type": ["object", "null"], "additionalProperties": false, "properties": parts() });
    let mut changes = json!({ "type": ["object", "null"], "additionalProperties": false, "properties": parts() });
    changes["properties"]["uses"] = json!({ "enum": kinds });
    changes["properties"]["matrix"] = json!({ "anyOf": [reference("matrix"), { "type": "null" }] });
    changes["properties"]["executor"] = stage_executor();
    changes["properties"]["resources"] = reference("resources");
    changes["properties"]["timeout"] = timeout();
    changes["properties"]["retries"] = retries();
    changes["not"] = json!({ "required": ["uses"] });
    let shared = json!({
        "name": { "type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$" },
        "variable": { "type": "string", "pattern": "\\$\\{[A-Za-z0-9_-]+\\}", "description": "Text with matrix variables." },
        "seed": { "anyOf": [{ "type": "integer", "minimum": 0 }, reference("variable")] },
        "selectors": {
            "description": "`stage`, `stage[label]`, `stage[*,label]`, or a list of these.",
            "anyOf": [{ "type": "string" }, { "type": "array", "items": { "type": "string" } }],
        },
        "matrix": {
            "description": "Variables, each a list of values or a map of labels to changes; the stage has one instance for each combination. `from: STAGE` takes the variables of another stage.",
            "type": "object",
            "propertyNames": reference("name"),
            "properties": { "from": { "description": "A stage whose matrix variables this one takes, without their changes.", "type": ["string", "array", "object"] } },
            "additionalProperties": {
                "anyOf": [
                    { "type": "array", "minItems": 1, "items": { "type": ["string", "number", "boolean"] } },
                    { "type": "object", "minProperties": 1, "additionalProperties": label },
                ],
            },
        },
        "profile": {
            "type": ["object", "null"],
            "additionalProperties": false,
            "properties": {
                "seed": reference("seed"),
                "targets": { "anyOf": [reference("selectors"), { "type": "null" }] },
                "stages": {
                    "type": "object",
                    "propertyNames": reference("name"),
                    "additionalProperties": { "anyOf": [reference("stage"), changes] },
                },
                "report": reference("report"),
                "remote": reference("remote"),
                "on_finish": reference("command"),
                "executors": reference("executors"),
                "pools": reference("pools"),
            },
        },
        "command": {
            "description": "A program and its arguments, started after a run with the run as JSON on its standard input.",
            "type": ["array", "null"],
            "items": { "type": ["string", "number", "boolean"] },
        },
        "executors": {
            "description": "Batch systems that stages can run on, by name. The name `slurm` also works without settings.",
            "type": ["object", "null"],
            "propertyNames": reference("name"),
            "additionalProperties": reference("executor"),
        },
        "executor": executor(),
        "resources": {
            "description": "What an attempt of the stage needs. On this machine, attempts start when it is free; a batch system is asked for it.",
            "type": ["object", "null"],
            "additionalProperties": false,
            "properties": {
                "threads": { "type": ["integer", "null"], "minimum": 1, "description": "CPU threads. If absent: 1; on this machine, a fair share for stages that train or sample." },
                "memory": { "type": ["string", "null"], "pattern": "^ *[0-9]+ *[MGT] *$", "description": "Such as `500M` or `16G`. If absent, on this machine: what an earlier attempt used." },
                "gpus": { "type": ["integer", "null"], "minimum": 0, "description": "Number of GPUs. If absent: 0; 1 for stages that train or sample under `--device cuda`." },
                "time": with_description(&reference("duration"), "Maximum time of a job of a batch system."),
                "pools": with_description(&reference("pools"), "Units of pools; on this machine only."),
            },
        },
        "pools": {
            "description": "Named things that stages share, with their number: `pools: { scratch: 2 }`.",
            "type": ["object", "null"],
            "propertyNames": reference("name"),
            "additionalProperties": { "type": ["integer", "null"], "minimum": 1 },
        },
        "duration": {
            "description": "Seconds, or text such as `30s`, `90m`, `2h`, `1d`, `12:00:00`.",
            "type": ["number", "string", "null"],
        },
        "remote": {
            "description": "Store shared with other machines: searched before a stage runs; new results are uploaded to it.",
            "anyOf": [
                { "type": ["string", "null"] },
                {
                    "type": "object",
                    "required": ["url"],
                    "additionalProperties": false,
                    "properties": {
                        "url": { "type": "string", "description": "A folder, or a URL: file, s3, gs, az or https." },
                        "read_only": { "type": "boolean", "description": "Whether nothing is uploaded; false if absent." },
                    },
                },
            ],
        },
        "report": {
            "type": ["object", "null"],
            "additionalProperties": false,
            "properties": {
                "tuning_seeds": {
                    "description": "Seeds on which settings were chosen: the report warns about results from one of them.",
                    "type": ["array", "null"],
                    "items": { "type": "integer", "minimum": 0 },
                },
                "notes": {
                    "description": "Notes shown in the report.",
                    "type": ["array", "null"],
                    "items": { "type": "string" },
                },
                "deviations": {
                    "description": "Notes for the list of deviations from the paper.",
                    "type": ["array", "null"],
                    "items": { "type": "string" },
                },
            },
        },
    });
    match shared {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

fn stage(kind: &dyn AnyKind) -> Value {
    json!({
        "type": "object",
        "description": kind.about(),
        "required": ["uses"],
        "additionalProperties": false,
        "properties": {
            "uses": { "const": kind.name(), "description": kind.about() },
            "with": reference(&definition(kind)),
            "needs": ports(kind),
            "matrix": reference("matrix"),
            "seed": reference("seed"),
            "executor": stage_executor(),
            "resources": reference("resources"),
            "timeout": timeout(),
            "retries": retries(),
        },
    })
}

fn timeout() -> Value {
    with_description(
        &reference("duration"),
        "Maximum time of an attempt; it ends with a checkpoint if its kind writes any.",
    )
}

fn retries() -> Value {
    json!({
        "type": ["integer", "null"],
        "minimum": 0,
        "description": "Further tries after any failure; if absent, only after failures that may pass.",
    })
}

fn stage_executor() -> Value {
    json!({ "type": ["string", "null"], "description": "Executor of the stage's attempts; `local` if absent." })
}

/// The settings of an executor; a profile may give a part of them.
fn executor() -> Value {
    let text = |description: &str| json!({ "type": ["string", "null"], "description": description });
    let flag = |description: &str| json!({ "type": ["boolean", "null"], "description": description });
    let number = |least: u64, description: &str| json!({ "type": ["integer", "null"], "minimum": least, "description": description });
    let duration = |description: &str| with_description(&reference("duration"), description);
    json!({
        "type": ["object", "null"],
        "additionalProperties": false,
        "properties": {
            "type": { "enum": ["slurm", "submit"], "description": "`slurm`, or `submit` for commands of your own." },
            "max_jobs": number(1, "Maximum number of submitted jobs; 100 if absent."),
            "interval": duration("Time between two queries of the state of all jobs; 10 s if absent."),
            "grace": duration("Time in which the result of an ended job may still appear; 60 s if absent."),
            "retries": number(0, "Further tries after a vanished job, a lost node or a time limit; 2 if absent."),
            "backoff": duration("Pause before the second try, four times as long before each further one; 10 s if absent."),
            "probe": flag("Whether a job checks the shared file system before a run; true if absent."),
            "resources": reference("resources"),
            "partition": text("Partition of Slurm."),
            "account": text("Account of Slurm."),
            "flags": {
                "description": "Further arguments of sbatch.",
                "type": ["array", "null"],
                "items": { "type": "string", "pattern": "^-" },
            },
            "signal": duration("Time before its limit at which a job of Slurm gets SIGTERM; 60 s if absent."),
            "requeue": flag("Whether Slurm may start a preempted job again; true if absent."),
            "submit": text("Shell command that submits `{script}` and prints the job's id."),
            "status": text("Shell command that prints the ids of all live jobs."),
            "cancel": text("Shell command that cancels `{job}`."),
        },
    })
}

fn ports(kind: &dyn AnyKind) -> Value {
    let mut ports = Map::new();
    for spec in describe(kind).ports {
        let (condition, port) = (spec.condition(), spec.port);
        let types = if port.accepts.is_empty() { "any artifact".to_owned() } else { port.accepts.join(" or ") };
        let count = match port.arity {
            Arity::One => "one",
            Arity::Optional => "at most one",
            Arity::Many => "one or more",
        };
        let condition = if condition.is_empty() { condition } else { format!(" ({condition})") };
        let description = format!("Takes {count}: {types}{condition}.");
        ports.insert(port.name, with_description(&reference("selectors"), &description));
    }
    json!({ "type": ["object", "null"], "properties": ports, "additionalProperties": reference("selectors") })
}

/// The schema of a kind's parameters. Any of them may be a variable instead, and none is required, because a matrix
/// label may supply it.
fn parameters(kind: &dyn AnyKind) -> Value {
    let mut schema = kind.schema().to_value();
    let prefix = format!("#/$defs/{}", definition(kind));
    let mut pending = vec![&mut schema];
    while let Some(next) = pending.pop() {
        match next {
            Value::Object(object) => {
                if let Some(Value::String(target)) = object.get_mut("$ref")
                    && let Some(inside) = target.strip_prefix('#')
                {
                    *target = format!("{prefix}{inside}");
                }
                if let Some(Value::Object(properties)) = object.get_mut("properties") {
                    properties.values_mut().for_each(allow_variable);
                }
                object.get_mut("items").into_iter().for_each(allow_variable);
                // A default is a value, not a schema.
                pending.extend(
                    object
                        .iter_mut()
                        .filter(|(key, _)| !matches!(key.as_str(), "default" | "enum" | "const"))
                        .map(|(_, v)| v),
                );
            }
            Value::Array(items) => pending.extend(items),
            _ => {}
        }
    }
    if let Value::Object(object) = &mut schema {
        object.retain(|key, _| !matches!(key.as_str(), "$schema" | "title" | "required"));
    }
    schema
}

/// Allows text with variables in addition to the values that `schema` allows.
fn allow_variable(schema: &mut Value) {
    if schema.get("type").is_some_and(|t| t == "string") && schema.get("enum").is_none() {
        return;
    }
    let Value::Object(object) = schema else { return };
    let mut outer = Map::new();
    for key in ["description", "default"] {
        outer.extend(object.shift_remove(key).map(|value| (key.to_owned(), value)));
    }
    let inner = Value::Object(std::mem::take(object));
    // `inner` is inlined, not referenced, because references inside a kind's schema are rewritten.
    outer.insert("anyOf".into(), json!([inner, { "type": "string", "pattern": "\\$\\{" }]));
    *object = outer;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::tests::kinds::registry;

    #[test]
    fn every_reference_resolves() {
        let schema = schema(&registry());
        let mut pending = vec![&schema];
        let mut references = 0;
        while let Some(next) = pending.pop() {
            match next {
                Value::Object(object) => {
                    if let Some(Value::String(target)) = object.get("$ref") {
                        references += 1;
                        assert!(schema.pointer(target.trim_start_matches('#')).is_some(), "{target}");
                    }
                    pending.extend(object.values());
                }
                Value::Array(items) => pending.extend(items),
                _ => {}
            }
        }
        assert!(references > 20, "{references}");
    }

    #[test]
    fn parameters_have_their_types_or_a_variable() {
        let schema = schema(&registry());
        let posts = &schema["$defs"]["kind:dataset"]["properties"]["posts"];
        assert_eq!(posts["anyOf"][0]["type"], "integer");
        assert_eq!(posts["anyOf"][1]["pattern"], "\\$\\{");
        assert_eq!(posts["default"], 100);
        assert_eq!(schema["$defs"]["kind:dataset"]["additionalProperties"], false);
        let train = schema["$defs"]["stage"]["oneOf"]
            .as_array()
            .and_then(|all| all.iter().find(|s| s["properties"]["uses"]["const"] == "train"));
        let needs = &train.expect("the registry has `train`")["properties"]["needs"]["properties"];
        assert_eq!(needs["posts"]["description"], "Takes one: Posts or Preferences.");
    }
}

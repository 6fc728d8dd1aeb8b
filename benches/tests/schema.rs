#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]
//! Validates the command's output against the schema that the repository promises.
//!
//! The validator supports the part of JSON Schema that ours uses, and refuses a schema that uses
//! more.

use std::process::Command;

use hearth_tests::kvm;
use serde_json::Value;

fn schema() -> Value {
    serde_json::from_str(include_str!("../schema.json")).unwrap()
}

/// Returns the results of one run of the command.
fn results(args: &[&str]) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_vmm-bench"))
        .args(args)
        .arg("--json")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Collects where `value` violates `schema`.
fn violations(root: &Value, schema: &Value, value: &Value, at: &str, found: &mut Vec<String>) {
    let mut say = |what: &str| found.push(format!("{at}: {what}: {value}"));
    let mut nested = Vec::new();
    for (keyword, asked) in schema.as_object().unwrap() {
        match keyword.as_str() {
            "$schema" | "$defs" | "title" | "description" => {}
            "$ref" => {
                let path = asked.as_str().unwrap().strip_prefix('#').unwrap();
                let target = root.pointer(path).expect("a reference within the schema");
                nested.push((target, value, at.to_owned()));
            }
            "const" if value != asked => say("not the constant"),
            "enum" if !asked.as_array().unwrap().contains(value) => say("not one of these"),
            "type" if !has_type(asked, value) => say("of another type"),
            "minimum"
                if value
                    .as_f64()
                    .is_some_and(|it| it < asked.as_f64().unwrap()) =>
            {
                say("too small");
            }
            "minItems" if len(value) < asked.as_u64().unwrap() => say("too few"),
            "maxItems" if len(value) > asked.as_u64().unwrap() => say("too many"),
            "required" => {
                for name in asked.as_array().unwrap() {
                    if value.get(name.as_str().unwrap()).is_none() {
                        say(&format!("{name} is missing"));
                    }
                }
            }
            "additionalProperties" => {
                assert_eq!(*asked, Value::Bool(false));
                let known = schema["properties"].as_object().unwrap();
                for (name, _) in value.as_object().into_iter().flatten() {
                    if !known.contains_key(name) {
                        say(&format!("{name} is not in the schema"));
                    }
                }
            }
            "properties" => {
                for (name, property) in asked.as_object().unwrap() {
                    if let Some(field) = value.get(name) {
                        nested.push((property, field, format!("{at}/{name}")));
                    }
                }
            }
            "items" => {
                for (index, item) in value.as_array().into_iter().flatten().enumerate() {
                    nested.push((asked, item, format!("{at}/{index}")));
                }
            }
            "oneOf" => {
                let fits = |schema: &&Value| {
                    let mut found = Vec::new();
                    violations(root, schema, value, at, &mut found);
                    found.is_empty()
                };
                if asked.as_array().unwrap().iter().filter(fits).count() != 1 {
                    say("not exactly one of these");
                }
            }
            "const" | "enum" | "type" | "minimum" | "minItems" | "maxItems" => {}
            other => panic!("the schema uses {other}, which is not checked"),
        }
    }
    for (schema, value, at) in nested {
        violations(root, schema, value, &at, found);
    }
}

fn len(value: &Value) -> u64 {
    value.as_array().map_or(0, Vec::len) as u64
}

fn has_type(asked: &Value, value: &Value) -> bool {
    let names = asked.as_array().cloned();
    let names = names.unwrap_or_else(|| vec![asked.clone()]);
    names.iter().any(|name| match name.as_str().unwrap() {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "number" => value.is_number(),
        "integer" => value.is_i64() || value.is_u64(),
        "null" => value.is_null(),
        other => panic!("the schema uses type {other}, which is not checked"),
    })
}

fn check(value: &Value) -> Vec<String> {
    let (schema, mut found) = (schema(), Vec::new());
    violations(&schema, &schema, value, "", &mut found);
    found
}

#[test]
fn what_the_command_prints_is_what_the_schema_says() {
    if !kvm() {
        return;
    }
    // With ratios, and with targets.
    let forks = results(&["fork", "-n", "12"]);
    assert_eq!(check(&forks), [""; 0]);
    assert!(len(&forks["results"]) >= 4);
    let churn = results(&["churn", "-n", "1"]);
    assert_eq!(check(&churn), [""; 0]);
    assert_eq!(len(&churn["targets"]), 3);
    let sweep = results(&["churn", "-n", "2", "--sweep", "memory=64,128"]);
    assert_eq!(check(&sweep), [""; 0]);
    assert_eq!(len(&sweep["fits"]), 6);
    // Too few samples for its two ratios: this is reported, and there is no ratio.
    let few = results(&["fork", "-n", "3"]);
    assert_eq!(check(&few), [""; 0]);
    assert_eq!((len(&few["ratios"]), len(&few["not_measured"])), (0, 2));
}

#[test]
fn what_the_schema_does_not_say_is_found() {
    let good = serde_json::json!({
        "schema": 1,
        "env": {"version": "0", "cpu": "c", "cpus": 2, "kernel": "k", "profile": "native", "load": 0.5,
            "date": "2026-01-31", "governor": ""},
        "results": [{"scenario": "s", "metric": "m", "unit": "us", "side": "hearth", "n": 1, "min": 1.0,
            "p50": 1.0, "p95": 1.0, "p99": 1.0, "max": 1.0, "samples": [1.0]}],
        "ratios": [{"metric": "m", "a": "a", "b": "b", "ratio": 1.0, "ci95": [0.9, 1.1], "n": 10}],
        "targets": [{"metric": "m", "side": "s", "unit": "us", "statistic": "p50",
            "bound": {"at_most": 1.0}, "figure": null}],
        "fits": [{"scenario": "s", "metric": "m", "unit": "us", "side": "hearth", "per": "MiB",
            "points": [[128, 1.0], [256, 2.0]], "base": 0.0, "slope": 0.1, "ci95": [-0.1, 0.3]}],
        "notes": ["said"],
        "not_measured": ["why"]
    });
    assert_eq!(check(&good), [""; 0]);
    let spoil = |path: &str, value: Value| {
        let mut bad = good.clone();
        *bad.pointer_mut(path).unwrap() = value;
        check(&bad).len()
    };
    for (path, value) in [
        ("/schema", 2.into()),
        ("/env/profile", "Native".into()),
        ("/env/cpus", 0.into()),
        ("/results/0/n", 1.5.into()),
        ("/results/0/samples", Value::Array(vec![])),
        ("/results/0", serde_json::json!({"scenario": "s"})),
        ("/ratios/0/ci95", serde_json::json!([1.0])),
        ("/ratios/0/n", 9.into()),
        (
            "/targets/0/bound",
            serde_json::json!({"at_most": 1, "at_least": 1}),
        ),
        ("/targets/0/bound", serde_json::json!({"about": 1})),
        ("/fits/0/points", serde_json::json!([[128, 1.0]])),
        ("/fits/0/per", "GiB".into()),
        ("/not_measured", "why".into()),
    ] {
        assert!(
            spoil(path, value.clone()) > 0,
            "{path}: {value} was let through"
        );
    }
    let mut more = good.clone();
    more["extra"] = 1.into();
    assert_eq!(check(&more).len(), 1);
}

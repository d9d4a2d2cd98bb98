//! What form an answer must have: `response_format`, `tools` and how they are to be called.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use sirocco_model::GrammarError;
use sirocco_types::{Calls, Grammar, JsonSchema, Otherwise, Tool, grammar_limits};

use super::body::Fields;
use super::choice::Kind;
use super::problem::Problem;

/// Longest name of a tool.
const NAME_BYTES: usize = 64;
const SCHEMA: &str = "response_format.json_schema.schema";

/// What form an answer must have.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Form {
    /// None for any text.
    pub(super) grammar: Option<Grammar>,
    /// The tools the model is told of, as the client wrote them.
    pub(super) tools: Vec<Value>,
    /// The places in `tools` of those that may be called.
    callable: Vec<usize>,
}

impl Form {
    /// Whether tools may be called.
    pub(super) fn calls(&self) -> bool {
        !self.callable.is_empty()
    }

    /// Whether the answer can be nothing but calls.
    pub(super) fn must_call(&self) -> bool {
        matches!(&self.grammar, Some(Grammar::Calls(calls)) if calls.otherwise == Otherwise::Nothing)
    }

    /// Blames the field that a grammar that cannot be used came from.
    pub(super) fn blame(&self, error: &GrammarError) -> Problem {
        match error.tool.and_then(|index| self.callable.get(index)) {
            Some(place) => Problem::invalid(parameters(*place), &error.reason),
            None if self.calls() => Problem::invalid("tools", &error.reason),
            None => Problem::invalid(SCHEMA, &error.reason),
        }
    }
}

/// How tools are to be used.
enum Choice {
    Never,
    Maybe,
    Must,
    /// This one must.
    Named(usize),
}

/// Reads and checks everything about the answer's form in `fields`.
pub(super) fn form(kind: Kind, fields: &Fields) -> Result<Form, Problem> {
    let format = format(&fields.response_format)?;
    let list = tools(&fields.tools)?;
    let choice = choice(&fields.tool_choice, &list)?;
    if kind == Kind::Completion && !list.is_empty() {
        return Err(Problem::unsupported("tools"));
    }
    let callable: Vec<usize> = match choice {
        Choice::Never => Vec::new(),
        Choice::Maybe | Choice::Must => (0..list.len()).collect(),
        Choice::Named(index) => vec![index],
    };
    let grammar = if callable.is_empty() {
        format.map(Grammar::Json)
    } else {
        Some(Grammar::Calls(Calls {
            tools: callable.iter().map(|index| list[*index].clone()).collect(),
            several: fields.parallel_tool_calls != Some(false) && !matches!(choice, Choice::Named(_)),
            otherwise: match (&choice, format) {
                (Choice::Maybe, Some(schema)) => Otherwise::Json(schema),
                (Choice::Maybe, None) => Otherwise::Text,
                _ => Otherwise::Nothing,
            },
        }))
    };
    if grammar.is_some() && fields.ignore_eos == Some(true) {
        let problem = "not supported together with response_format or tools, which say where to end";
        return Err(Problem::invalid("ignore_eos", problem));
    }
    let shown = match (&choice, &fields.tools) {
        (Choice::Never, _) => Vec::new(),
        (_, Value::Array(tools)) => tools.clone(),
        _ => Vec::new(),
    };
    Ok(Form { grammar, tools: shown, callable })
}

/// The JSON that an answer must be; none for any text.
fn format(given: &Value) -> Result<Option<JsonSchema>, Problem> {
    const TYPES: &str = "must be \"text\", \"json_object\" or \"json_schema\"";
    if given.is_null() {
        return Ok(None);
    }
    match given["type"].as_str() {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(JsonSchema::object())),
        Some("json_schema") => {
            let named = &given["json_schema"];
            if !named.is_object() {
                return Err(Problem::invalid("response_format.json_schema", "must be an object with name and schema"));
            }
            name("response_format.json_schema.name", &named["name"])?;
            let strict = boolean("response_format.json_schema.strict", &named["strict"])?;
            match &named["schema"] {
                Value::Null => Err(Problem::invalid(SCHEMA, "absent, it must be a JSON Schema")),
                schema => Ok(Some(JsonSchema { text: schema.to_string(), strict })),
            }
        }
        Some(other) => Err(Problem::invalid("response_format.type", format!("{other:?}, {TYPES}"))),
        None => Err(Problem::invalid("response_format.type", TYPES)),
    }
}

fn tools(given: &Value) -> Result<Vec<Tool>, Problem> {
    let list = match given {
        Value::Null => return Ok(Vec::new()),
        Value::Array(list) => list,
        _ => return Err(Problem::invalid("tools", "must be a list of tools")),
    };
    if list.is_empty() || list.len() > grammar_limits::TOOLS {
        let problem = format!("{} tools, there may be 1 to {}", list.len(), grammar_limits::TOOLS);
        return Err(Problem::invalid("tools", problem));
    }
    let bytes = given.to_string().len();
    if bytes > grammar_limits::TOOLS_BYTES {
        let problem = format!("{bytes} bytes of JSON, there may be {}", grammar_limits::TOOLS_BYTES);
        return Err(Problem::invalid("tools", problem));
    }
    let tools = list.iter().enumerate().map(|(index, given)| tool(index, given)).collect::<Result<Vec<_>, _>>()?;
    let mut names = BTreeSet::new();
    match tools.iter().position(|tool| !names.insert(&tool.name)) {
        Some(index) => {
            let problem = format!("{:?} is the name of another tool too", tools[index].name);
            Err(Problem::invalid(format!("tools[{index}].function.name"), problem))
        }
        None => Ok(tools),
    }
}

fn tool(index: usize, given: &Value) -> Result<Tool, Problem> {
    let param = |field: &str| format!("tools[{index}].{field}");
    if given["type"] != "function" {
        return Err(Problem::invalid(param("type"), "must be \"function\""));
    }
    let function = &given["function"];
    if !function.is_object() {
        return Err(Problem::invalid(param("function"), "must be an object with a name"));
    }
    let name = name(&param("function.name"), &function["name"])?;
    if !(function["description"].is_null() || function["description"].is_string()) {
        return Err(Problem::invalid(param("function.description"), "must be a string"));
    }
    let strict = boolean(&param("function.strict"), &function["strict"])?;
    let none = json!({"type": "object", "properties": {}, "additionalProperties": false});
    let schema = match &function["parameters"] {
        Value::Null => &none,
        schema if schema["type"] == "object" => schema,
        Value::Object(fields) if fields.is_empty() => &none,
        _ => return Err(Problem::invalid(parameters(index), "must be a JSON Schema whose type is \"object\"")),
    };
    Ok(Tool { name, arguments: JsonSchema { text: schema.to_string(), strict } })
}

fn parameters(index: usize) -> String {
    format!("tools[{index}].function.parameters")
}

fn choice(given: &Value, tools: &[Tool]) -> Result<Choice, Problem> {
    const PARAM: &str = "tool_choice";
    const FORMS: &str =
        "must be \"none\", \"auto\", \"required\" or {\"type\": \"function\", \"function\": {\"name\": …}}";
    match given {
        Value::Null => Ok(if tools.is_empty() { Choice::Never } else { Choice::Maybe }),
        Value::String(word) => match word.as_str() {
            "none" => Ok(Choice::Never),
            "auto" => Ok(Choice::Maybe),
            // The latter is Mistral's word.
            "required" | "any" if tools.is_empty() => Err(Problem::invalid(PARAM, format!("{word:?} needs tools"))),
            "required" | "any" => Ok(Choice::Must),
            _ => Err(Problem::invalid(PARAM, format!("{word:?}, {FORMS}"))),
        },
        _ => {
            let name = given["function"]["name"].as_str().filter(|_| given["type"] == "function");
            let name = name.ok_or_else(|| Problem::invalid(PARAM, FORMS))?;
            let index = tools.iter().position(|tool| tool.name == name);
            let unknown = || Problem::invalid("tool_choice.function.name", format!("{name:?} is not among the tools"));
            index.map(Choice::Named).ok_or_else(unknown)
        }
    }
}

fn name(param: &str, given: &Value) -> Result<String, Problem> {
    let plain = |name: &&str| {
        (1..=NAME_BYTES).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte))
    };
    let name = given.as_str().filter(plain).map(str::to_owned);
    name.ok_or_else(|| {
        Problem::invalid(param, format!("must be 1 to {NAME_BYTES} letters, digits, underscores or hyphens"))
    })
}

fn boolean(param: &str, given: &Value) -> Result<bool, Problem> {
    match given {
        Value::Null => Ok(false),
        Value::Bool(value) => Ok(*value),
        _ => Err(Problem::invalid(param, "must be true or false")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(fields: Value) -> Result<Form, Problem> {
        form(Kind::Chat, &serde_json::from_value(fields).unwrap())
    }

    fn function(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}})
    }

    fn tool(name: &str) -> Tool {
        Tool { name: name.into(), arguments: JsonSchema { text: r#"{"type":"object"}"#.into(), strict: false } }
    }

    #[test]
    fn a_format_is_a_grammar() {
        let schema = json!({"type": "integer"});
        let format = |given: Value| json!({"response_format": given});
        let named = |strict: Value| {
            format(json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": strict}}))
        };
        let wanted = |strict| Some(Grammar::Json(JsonSchema { text: r#"{"type":"integer"}"#.into(), strict }));
        let cases = [
            (json!({}), None),
            (format(json!({"type": "text"})), None),
            (format(json!({"type": "json_object"})), Some(Grammar::Json(JsonSchema::object()))),
            (named(true.into()), wanted(true)),
            (named(Value::Null), wanted(false)),
            (json!({"tools": [function("f")], "tool_choice": "none"}), None),
        ];
        for (fields, grammar) in cases {
            let read = read(fields.clone()).unwrap();
            assert!(read.grammar == grammar && read.tools.is_empty() && !read.calls(), "{fields}");
        }
    }

    #[test]
    fn tools_are_called_as_chosen() {
        let tools = json!([function("f"), function("g")]);
        let both = vec![tool("f"), tool("g")];
        let named = json!({"type": "function", "function": {"name": "g"}});
        let json = Otherwise::Json(JsonSchema::object());
        let cases = [
            (json!({}), both.clone(), true, Otherwise::Text),
            (json!({"tool_choice": "auto"}), both.clone(), true, Otherwise::Text),
            (json!({"tool_choice": "auto", "response_format": {"type": "json_object"}}), both.clone(), true, json),
            (json!({"tool_choice": "required"}), both.clone(), true, Otherwise::Nothing),
            (json!({"tool_choice": "any", "parallel_tool_calls": false}), both, false, Otherwise::Nothing),
            (json!({"tool_choice": named}), vec![tool("g")], false, Otherwise::Nothing),
        ];
        for (mut fields, callable, several, otherwise) in cases {
            fields["tools"] = tools.clone();
            let read = read(fields.clone()).unwrap();
            let calls = Calls { tools: callable, several, otherwise };
            assert!(read.grammar == Some(Grammar::Calls(calls)) && read.calls(), "{fields}");
            assert_eq!(json!(read.tools), tools);
        }
    }

    #[test]
    fn a_bad_form_is_blamed_by_its_field() {
        let tools = |tools: Value| json!({"tools": tools});
        let with = |field: &str, value: Value| {
            let mut tool = function("f");
            tool["function"][field] = value;
            json!({"tools": [function("a"), tool]})
        };
        let choice = |choice: Value| json!({"tools": [function("f")], "tool_choice": choice});
        let format = |format: Value| json!({"response_format": format});
        let many: Vec<Value> = (0..129).map(|index| function(&format!("f{index}"))).collect();
        let schema = |schema: Value| format(json!({"type": "json_schema", "json_schema": schema}));
        let cases = [
            (format(json!("json")), "response_format.type"),
            (format(json!({"type": "xml"})), "response_format.type"),
            (format(json!({"type": "json_schema"})), "response_format.json_schema"),
            (schema(json!({"schema": {}})), "response_format.json_schema.name"),
            (schema(json!({"name": "a b", "schema": {}})), "response_format.json_schema.name"),
            (schema(json!({"name": "a"})), "response_format.json_schema.schema"),
            (schema(json!({"name": "a", "schema": {}, "strict": 1})), "response_format.json_schema.strict"),
            (tools(json!({})), "tools"),
            (tools(json!([])), "tools"),
            (tools(json!(many)), "tools"),
            (tools(json!([{}])), "tools[0].type"),
            (tools(json!([function("f"), {"type": "function"}])), "tools[1].function"),
            (tools(json!([function("f"), function("g"), function("f")])), "tools[2].function.name"),
            (with("name", json!("with space")), "tools[1].function.name"),
            (with("name", json!("n".repeat(65))), "tools[1].function.name"),
            (with("name", Value::Null), "tools[1].function.name"),
            (with("description", json!(5)), "tools[1].function.description"),
            (with("description", json!("x".repeat(256 << 10))), "tools"),
            (with("strict", json!("yes")), "tools[1].function.strict"),
            (with("parameters", json!([])), "tools[1].function.parameters"),
            (with("parameters", json!({"type": "string"})), "tools[1].function.parameters"),
            (choice(json!("maybe")), "tool_choice"),
            (choice(json!({"type": "function"})), "tool_choice"),
            (choice(json!({"type": "function", "function": {"name": "g"}})), "tool_choice.function.name"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"tools": [function("f")], "ignore_eos": true}), "ignore_eos"),
        ];
        for (fields, param) in cases {
            let problem = read(fields.clone()).unwrap_err();
            assert_eq!(problem.param.as_deref(), Some(param), "{fields}");
            assert!(problem.message.starts_with(&format!("{param}: ")), "{}", problem.message);
        }
        let fields = serde_json::from_value(tools(json!([function("f")]))).unwrap();
        assert_eq!(form(Kind::Completion, &fields).unwrap_err().param.as_deref(), Some("tools"));
    }

    #[test]
    fn a_bad_grammar_is_blamed_on_the_field_it_came_from() {
        let blamed = |fields: Value, tool| {
            let error = GrammarError { tool, reason: "why".into() };
            read(fields).unwrap().blame(&error).message
        };
        let named = json!({"type": "function", "function": {"name": "g"}});
        let tools = json!([function("f"), function("g")]);
        assert_eq!(blamed(json!({"response_format": {"type": "json_object"}}), None), format!("{SCHEMA}: why"));
        assert_eq!(blamed(json!({"tools": tools}), Some(0)), "tools[0].function.parameters: why");
        assert_eq!(blamed(json!({"tools": tools, "tool_choice": named}), Some(0)), "tools[1].function.parameters: why");
        assert_eq!(blamed(json!({"tools": tools}), None), "tools: why");
    }
}

//! Every field of every request of `sirocco.inference.v1`: it changes the answer as its comment says, or is refused by name. The
//! fields are those of the descriptors that servers reflect, so a new one without a case fails.

use std::collections::{BTreeMap, BTreeSet};

use prost::Message as _;
use prost_types::field_descriptor_proto::Type;
use prost_types::{DescriptorProto, FileDescriptorSet};
use sirocco_proto::channel::{self, MAX_MESSAGE_BYTES};
use sirocco_proto::inference::InferenceServiceClient;
use sirocco_proto::tonic::{Code, Status};
use sirocco_proto::wire::inference as wire;
use sirocco_proto::wire::inference::generate_request::{Constraint, Prompt};
use sirocco_proto::wire::inference::generate_response::Event;
use tonic::transport::Channel;

use crate::openai::cluster;
use crate::support::{Golden, goldens, greedy};

const PACKAGE: &str = "sirocco.inference.v1";
/// Tokens of an answer, as many as goldens have.
const TOKENS: u32 = 48;

type Client = InferenceServiceClient<Channel>;

/// All that was said.
#[derive(Debug, Default)]
struct Said {
    ids: Vec<u32>,
    text: String,
    tokens: Vec<wire::Token>,
    finished: wire::Finished,
}

type Answer = Result<Said, Status>;

/// Two requests that differ by a field.
struct Case {
    field: &'static str,
    without: wire::GenerateRequest,
    with: wire::GenerateRequest,
    /// Whether the answers to both differ as they should.
    effect: fn(&Answer, &Answer) -> bool,
}

async fn ask(client: &mut Client, request: wire::GenerateRequest) -> Answer {
    let mut events = client.generate(request).await?.into_inner();
    let mut said = Said::default();
    while let Some(response) = events.message().await? {
        match response.event {
            Some(Event::Token(token)) => {
                said.ids.push(token.id);
                said.text += &token.text;
                said.tokens.push(token);
            }
            Some(Event::Finished(finished)) => {
                said.text += &finished.text;
                said.finished = finished;
            }
            Some(Event::Started(_)) | None => {}
        }
    }
    Ok(said)
}

fn golden() -> Golden {
    goldens().swap_remove(0)
}

fn base() -> wire::GenerateRequest {
    greedy(&golden().prompt, TOKENS)
}

/// What is greedy but for `sampling`.
fn sampled(sampling: wire::SamplingParams) -> wire::GenerateRequest {
    let temperature = sampling.temperature.or(Some(0.0));
    wire::GenerateRequest { sampling: Some(wire::SamplingParams { temperature, ..sampling }), ..base() }
}

/// What is drawn at random, but always the same.
fn drawn(sampling: wire::SamplingParams) -> wire::GenerateRequest {
    let seed = sampling.seed.or(Some(5));
    sampled(wire::SamplingParams { temperature: Some(1.5), seed, ..sampling })
}

fn text(answer: &Answer) -> &str {
    &answer.as_ref().unwrap().text
}

fn tokens(answer: &Answer) -> &[wire::Token] {
    &answer.as_ref().unwrap().tokens
}

fn another_text(before: &Answer, after: &Answer) -> bool {
    text(before) == golden().greedy_text && text(after) != golden().greedy_text
}

fn the_most_likely_text(before: &Answer, after: &Answer) -> bool {
    text(before) != golden().greedy_text && text(after) == golden().greedy_text
}

fn refused(answer: &Answer, code: Code, field: &str) -> bool {
    answer.as_ref().is_err_and(|status| status.code() == code && status.message().starts_with(field))
}

fn case(
    field: &'static str,
    without: wire::GenerateRequest,
    with: wire::GenerateRequest,
    effect: fn(&Answer, &Answer) -> bool,
) -> Case {
    Case { field, without, with, effect }
}

/// Fields that say how tokens are drawn.
fn drawing() -> Vec<Case> {
    let plain = wire::SamplingParams::default;
    let changed = |field, sampling| case(field, base(), sampled(sampling), another_text);
    let likely = |field, sampling| case(field, drawn(plain()), drawn(sampling), the_most_likely_text);
    let banned = [(golden().greedy_ids[0], -100.0)].into();
    let other_seed = drawn(wire::SamplingParams { seed: Some(6), ..plain() });
    vec![
        changed("sampling.temperature", wire::SamplingParams { temperature: Some(1.5), seed: Some(5), ..plain() }),
        likely("sampling.top_k", wire::SamplingParams { top_k: Some(1), ..plain() }),
        likely("sampling.top_p", wire::SamplingParams { top_p: Some(1e-6), ..plain() }),
        likely("sampling.min_p", wire::SamplingParams { min_p: Some(1.0), ..plain() }),
        changed("sampling.repetition_penalty", wire::SamplingParams { repetition_penalty: Some(5.0), ..plain() }),
        changed("sampling.presence_penalty", wire::SamplingParams { presence_penalty: Some(2.0), ..plain() }),
        changed("sampling.frequency_penalty", wire::SamplingParams { frequency_penalty: Some(2.0), ..plain() }),
        changed("sampling.logit_bias", wire::SamplingParams { logit_bias: banned, ..plain() }),
        case("sampling.seed", drawn(plain()), other_seed, |before, after| text(before) != text(after)),
    ]
}

/// Fields that say what is completed and when it ends.
fn asking() -> Vec<Case> {
    let prompt = |prompt| wire::GenerateRequest { prompt: Some(prompt), ..base() };
    let other = goldens().swap_remove(1);
    let the_other = |before: &Answer, after: &Answer| {
        text(before) == golden().greedy_text && text(after) == goldens()[1].greedy_text
    };
    let ids = wire::TokenIds { ids: other.input_ids };
    let ends = sampled(wire::SamplingParams { logit_bias: [(2, 100.0)].into(), ..Default::default() });
    let endless = wire::GenerateRequest { max_tokens: Some(2000), ignore_eos: true, ..base() };
    let seeded = drawn(wire::SamplingParams::default());
    vec![
        case("model", base(), wire::GenerateRequest { model: "gpt-9".into(), ..base() }, |before, after| {
            before.is_ok() && refused(after, Code::NotFound, "model")
        }),
        case("text", base(), prompt(Prompt::Text(other.prompt)), the_other),
        case("token_ids.ids", base(), prompt(Prompt::TokenIds(ids)), the_other),
        case("max_tokens", base(), wire::GenerateRequest { max_tokens: Some(3), ..base() }, |before, after| {
            let whole = &before.as_ref().unwrap().ids;
            whole.len() == TOKENS as usize && after.as_ref().unwrap().ids == whole[..3]
        }),
        case(
            "stop",
            base(),
            wire::GenerateRequest { stop: vec![golden().greedy_text[8..12].into()], ..base() },
            |before, after| text(before) == golden().greedy_text && *text(after) == golden().greedy_text[..8],
        ),
        case("ignore_eos", ends.clone(), wire::GenerateRequest { ignore_eos: true, ..ends }, |before, after| {
            let reason = |answer: &Answer| answer.as_ref().unwrap().finished.reason();
            (reason(before), reason(after)) == (wire::FinishReason::Stop, wire::FinishReason::Length)
        }),
        // These are not what it would say by itself, so it goes on in another way.
        case(
            "generated_token_ids",
            seeded.clone(),
            wire::GenerateRequest { generated_token_ids: golden().greedy_ids[..8].to_vec(), ..seeded },
            |before, after| {
                let (before, after) = (before.as_ref().unwrap(), after.as_ref().unwrap());
                after.ids.len() == TOKENS as usize - 8 && !before.ids.ends_with(&after.ids)
            },
        ),
        case("priority", base(), wire::GenerateRequest { priority: 4, ..base() }, |before, after| {
            before.is_ok() && refused(after, Code::InvalidArgument, "priority")
        }),
        case("timeout_ms", base(), wire::GenerateRequest { timeout_ms: Some(10), ..endless }, |before, after| {
            before.is_ok() && after.as_ref().is_err_and(|status| status.code() == Code::DeadlineExceeded)
        }),
    ]
}

/// Fields that say what is reported.
fn reporting() -> Vec<Case> {
    let trace = |trace| wire::GenerateRequest { trace: Some(trace), ..base() };
    vec![
        case("logprobs", base(), wire::GenerateRequest { logprobs: Some(2), ..base() }, |before, after| {
            tokens(before).iter().all(|token| token.logprob.is_none())
                && tokens(after).iter().all(|token| token.logprob.is_some() && token.top_logprobs.len() == 2)
        }),
        case("trace.logits", base(), trace(wire::Trace { logits: true, ..Default::default() }), |before, after| {
            tokens(before).iter().all(|token| token.logits.is_empty())
                && tokens(after).iter().all(|token| !token.logits.is_empty())
        }),
        case("trace.routing", base(), trace(wire::Trace { routing: true, ..Default::default() }), |before, after| {
            tokens(before).iter().all(|token| token.routing.is_empty())
                && tokens(after).iter().all(|token| !token.routing.is_empty())
        }),
    ]
}

/// Fields that say of which form a completion is.
fn constraining() -> Vec<Case> {
    let constrained = |field, constraint, effect| {
        let random = drawn(wire::SamplingParams::default());
        case(field, random.clone(), wire::GenerateRequest { constraint: Some(constraint), ..random }, effect)
    };
    vec![
        constrained("json_schema", Constraint::JsonSchema("{\"enum\": [\"up\"]}".into()), |before, after| {
            text(before) != "\"up\"" && text(after) == "\"up\""
        }),
        constrained("json_object", Constraint::JsonObject(wire::JsonObject {}), |before, after| {
            !text(before).starts_with('{') && text(after).starts_with('{')
        }),
        constrained("regex", Constraint::Regex("ab{3}".into()), |before, after| {
            text(before) != "abbb" && text(after) == "abbb"
        }),
        constrained("lark", Constraint::Lark("start: \"x\" \"y\"".into()), |before, after| {
            text(before) != "xy" && text(after) == "xy"
        }),
    ]
}

fn cases() -> impl Iterator<Item = Case> {
    drawing().into_iter().chain(asking()).chain(reporting()).chain(constraining())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_field_of_generate_changes_the_answer_or_is_refused_by_name() {
    let (_process, grpc, _) = cluster(&[]);
    let channel = channel::connect(&grpc).await.unwrap();
    let mut client = InferenceServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
    for Case { field, without, with, effect } in cases() {
        let (before, after) = (ask(&mut client, without).await, ask(&mut client, with).await);
        let brief = |answer: &Answer| answer.as_ref().map(|said| said.text.clone()).map_err(ToString::to_string);
        assert!(effect(&before, &after), "{field}: {:?} without, {:?} with", brief(&before), brief(&after));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_field_of_the_tokenizer_changes_the_answer_or_is_refused_by_name() {
    let (_process, grpc, _) = cluster(&[]);
    let mut client = InferenceServiceClient::new(channel::connect(&grpc).await.unwrap());
    let Golden { prompt: text, input_ids, greedy_ids, .. } = golden();
    let asked = wire::TokenizeRequest { text, ..Default::default() };
    assert_eq!(client.tokenize(asked.clone()).await.unwrap().into_inner().ids, input_ids);
    let other = wire::TokenizeRequest { text: goldens()[1].prompt.clone(), ..Default::default() };
    assert_eq!(client.tokenize(other).await.unwrap().into_inner().ids, goldens()[1].input_ids);
    let plain = wire::TokenizeRequest { no_special_tokens: true, ..asked.clone() };
    assert_eq!(client.tokenize(plain).await.unwrap().into_inner().ids, input_ids[1..]);
    let unknown = wire::TokenizeRequest { model: "gpt-9".into(), ..asked };
    let status = client.tokenize(unknown).await.unwrap_err();
    assert!(status.code() == Code::NotFound && status.message().starts_with("model"), "{status}");

    let asked = wire::DetokenizeRequest { ids: greedy_ids, ..Default::default() };
    let whole = client.detokenize(asked.clone()).await.unwrap().into_inner().text;
    let part = wire::DetokenizeRequest { ids: asked.ids[..9].to_vec(), ..Default::default() };
    let part = client.detokenize(part).await.unwrap().into_inner().text;
    assert!(whole.len() > part.len() && whole.starts_with(&part), "{part:?}, {whole:?}");
    let status = client.detokenize(wire::DetokenizeRequest { model: "gpt-9".into(), ..asked }).await.unwrap_err();
    assert!(status.code() == Code::NotFound && status.message().starts_with("model"), "{status}");
}

/// The fields of `message` that hold values, those of messages within it by their path.
fn fields(message: &str, messages: &BTreeMap<String, DescriptorProto>) -> Vec<String> {
    let mut found = Vec::new();
    for field in &messages[message].field {
        let inner = match (field.r#type(), messages.get(field.type_name())) {
            // Maps are messages of no name of their own.
            (Type::Message, Some(_)) => fields(field.type_name(), messages),
            _ => Vec::new(),
        };
        if inner.is_empty() {
            found.push(field.name().to_owned());
        }
        found.extend(inner.iter().map(|inner| format!("{}.{inner}", field.name())));
    }
    found
}

#[test]
fn no_field_of_a_request_is_without_a_check() {
    let descriptors = FileDescriptorSet::decode(sirocco_proto::DESCRIPTORS).unwrap();
    let file = descriptors.file.into_iter().find(|file| file.package() == PACKAGE).unwrap();
    let named = |message: &DescriptorProto| (format!(".{PACKAGE}.{}", message.name()), message.clone());
    let messages = file.message_type.iter().map(named).collect();
    let methods = file.service.iter().flat_map(|service| &service.method);
    let found: BTreeSet<String> = methods
        .flat_map(|method| {
            let fields = fields(method.input_type(), &messages);
            fields.into_iter().map(move |field| format!("{}.{field}", method.name()))
        })
        .collect();
    let tokenizers =
        ["Tokenize.model", "Tokenize.text", "Tokenize.no_special_tokens", "Detokenize.model", "Detokenize.ids"];
    let checked = cases().map(|case| format!("Generate.{}", case.field)).chain(tokenizers.map(str::to_owned));
    assert_eq!(found, checked.collect());
}

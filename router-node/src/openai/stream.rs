//! An answer as server-sent events: a piece for each token that has something to say, then `[DONE]`. A failure in the middle is
//! an event with an `error`, and the last one.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use futures::{StreamExt as _, stream};
use serde_json::Value;
use sirocco_proto::inference::Event;

use super::answer::total;
use super::choice::{Choice, Kind, Piece};
use super::generate::Call;
use super::problem::Problem;
use crate::metrics::Outcome;

const DONE: &str = "[DONE]";

/// A stream on its way to the client, who ends it by leaving.
struct Sending {
    call: Call,
    /// Data of events to be sent before anything else.
    ready: VecDeque<String>,
    ended: bool,
}

/// Streams `call`.
pub(super) fn sse(call: Call) -> Response {
    let mut sending = Sending { call, ready: VecDeque::new(), ended: false };
    if sending.call.report.kind == Kind::Chat {
        let openings: Vec<Value> = sending.call.choices.iter().map(Choice::opening).collect();
        for opening in openings {
            sending.say(vec![opening]);
        }
    }
    let events = stream::unfold(sending, Sending::next);
    let events = events.map(|data| Ok::<_, Infallible>(SseEvent::default().data(data)));
    Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}

impl Sending {
    async fn next(mut self) -> Option<(String, Self)> {
        loop {
            if let Some(data) = self.ready.pop_front() {
                return Some((data, self));
            }
            if self.ended {
                return None;
            }
            match self.call.events.next().await {
                Some((index, Ok(event))) => self.take(index, event),
                Some((_, Err(error))) => {
                    let problem = Problem::from(error);
                    self.call.tracked.end(problem.outcome);
                    self.ready.push_back(problem.body().to_string());
                    self.ended = true;
                }
                None => self.end(),
            }
        }
    }

    fn take(&mut self, index: usize, event: Event) {
        self.call.count(&event);
        let mut piece = Piece::default();
        piece.add(event);
        for said in self.call.choices[index].say(&piece) {
            self.say(vec![said]);
        }
    }

    fn end(&mut self) {
        if self.call.include_usage {
            let mut last = self.call.head.piece(Vec::new());
            last["usage"] = total(self.call.usage);
            self.ready.push_back(last.to_string());
        }
        self.call.tracked.end(Outcome::Ok);
        self.ready.push_back(DONE.to_owned());
        self.ended = true;
    }

    fn say(&mut self, choices: Vec<Value>) {
        let mut piece = self.call.head.piece(choices);
        if self.call.include_usage {
            piece["usage"] = Value::Null;
        }
        self.ready.push_back(piece.to_string());
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use sirocco_model::Marker;
    use sirocco_proto::inference::{Finished, Token};
    use sirocco_types::{FinishReason, Timings, Usage};

    use super::super::answer::Head;
    use super::super::choice::Report;
    use super::*;
    use crate::engine::GenerateError;
    use crate::metrics::Front;
    use crate::metrics::tests::metrics;

    fn token(index: u32, text: &str) -> Event {
        let (text, top_logprobs) = (text.to_owned(), Vec::new());
        Event::Token(Token { index, id: 7, text, logprob: None, top_logprobs, logits: Vec::new(), routing: Vec::new() })
    }

    fn finished(text: &str) -> Event {
        let usage = Usage { prompt_tokens: 3, cached_tokens: 1, completion_tokens: 2 };
        Event::Finished(Finished { reason: FinishReason::Stop, usage, timings: Timings::default(), text: text.into() })
    }

    /// The frames of a stream of one choice.
    async fn frames(kind: Kind, token_ids: bool, events: Vec<Result<Event, GenerateError>>) -> Vec<String> {
        let report = Report { kind, logprobs: None, token_ids, experts: None, stream: true, calls: None };
        reported(report, events).await
    }

    async fn reported(report: Report, events: Vec<Result<Event, GenerateError>>) -> Vec<String> {
        let kind = report.kind;
        let events: std::pin::Pin<Box<dyn futures::Stream<Item = _> + Send>> =
            Box::pin(stream::iter(events.into_iter().map(|event| (0, event))));
        let call = Call {
            head: Head::example(kind),
            report: report.clone(),
            choices: vec![Choice::new(report, 0, vec![1, 2, 3], String::new())],
            events: Box::pin(stream::select_all([events]).peekable()),
            usage: Usage { prompt_tokens: 3, ..Usage::default() },
            include_usage: true,
            tracked: metrics().0.request(Front::Http),
        };
        let body = axum::body::to_bytes(sse(call).into_body(), usize::MAX).await.unwrap();
        let text = String::from_utf8(body.to_vec()).unwrap();
        assert!(text.ends_with("\n\n"));
        text.trim_end().split("\n\n").map(|frame| frame.strip_prefix("data: ").unwrap().to_owned()).collect()
    }

    fn json(frame: &str) -> Value {
        serde_json::from_str(frame).unwrap()
    }

    #[tokio::test]
    async fn a_stream_is_pieces_then_usage_then_done() {
        let events = || vec![Ok(token(0, "a\nb")), Ok(token(1, "")), Ok(finished("c"))];
        let frames = frames(Kind::Completion, false, events()).await;
        assert_eq!(frames.len(), 4, "a token without text says nothing: {frames:?}");
        assert_eq!(json(&frames[0])["choices"][0]["text"], "a\nb");
        assert_eq!(json(&frames[0])["usage"], Value::Null);
        let last = json!({"index": 0, "text": "c", "logprobs": null, "finish_reason": "stop"});
        assert_eq!(json(&frames[1])["choices"][0], last);
        let usage = json!({
            "prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "prompt_tokens_details": {"cached_tokens": 1},
        });
        assert_eq!(json(&frames[2])["usage"], usage);
        assert_eq!(json(&frames[2])["choices"], json!([]));
        assert_eq!(frames[3], "[DONE]");
    }

    #[tokio::test]
    async fn a_chat_begins_with_its_role_and_token_ids_miss_none() {
        let frames = frames(Kind::Chat, true, vec![Ok(token(0, "a")), Ok(token(1, "")), Ok(finished(""))]).await;
        let choice = |index: usize| json(&frames[index])["choices"][0].clone();
        assert_eq!(choice(0)["delta"], json!({"role": "assistant", "content": ""}));
        assert_eq!(
            (&choice(1)["delta"], &choice(1)["prompt_token_ids"]),
            (&json!({"content": "a"}), &json!([1, 2, 3]))
        );
        assert_eq!((&choice(2)["delta"], &choice(2)["token_ids"]), (&json!({}), &json!([7])));
        assert_eq!(choice(3)["finish_reason"], "stop");
    }

    #[tokio::test]
    async fn calls_of_tools_come_in_pieces_that_make_the_whole() {
        let texts = [
            "[TOOL",
            "_CALLS] [{\"name\": \"f\", \"arg",
            "uments\": {\"a\": ",
            "1}",
            "}, {\"name\": \"g\", \"arguments\": {",
            "}}]",
        ];
        let events = || {
            let tokens = texts.iter().zip(0..).map(|(text, index)| token(index, text));
            tokens.chain([finished("")]).collect::<Vec<_>>()
        };
        let calls = Some((Marker::Letters, "request".to_owned()));
        let report = Report { kind: Kind::Chat, logprobs: None, token_ids: false, experts: None, stream: true, calls };
        let frames = reported(report.clone(), events().into_iter().map(Ok).collect()).await;
        let choices: Vec<Value> = frames.iter().filter(|f| *f != DONE).map(|f| json(f)["choices"][0].clone()).collect();
        assert_eq!(choices[0]["delta"], json!({"role": "assistant", "content": null}));
        let mut calls: Vec<Value> = Vec::new();
        for choice in &choices[1..] {
            for piece in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
                let index = piece["index"].as_u64().unwrap() as usize;
                if index == calls.len() {
                    assert_eq!((&piece["type"], &piece["function"]["arguments"]), (&json!("function"), &json!("")));
                    calls.push(piece.clone());
                } else {
                    assert!(piece["id"].is_null() && piece["function"]["name"] == "");
                    let more = piece["function"]["arguments"].as_str().unwrap();
                    let arguments = format!("{}{more}", calls[index]["function"]["arguments"].as_str().unwrap());
                    calls[index]["function"]["arguments"] = arguments.into();
                }
            }
        }
        let reasons: Vec<&Value> =
            choices.iter().map(|choice| &choice["finish_reason"]).filter(|r| !r.is_null()).collect();
        assert_eq!(reasons, [&json!("tool_calls")]);

        let mut piece = Piece::default();
        for event in events() {
            piece.add(event);
        }
        let whole = Choice::new(Report { stream: false, ..report }, 0, Vec::new(), String::new()).whole(&piece);
        let message = &whole["message"];
        assert_eq!((&whole["finish_reason"], &message["content"]), (&json!("tool_calls"), &Value::Null));
        for (index, (streamed, whole)) in calls.iter_mut().zip(message["tool_calls"].as_array().unwrap()).enumerate() {
            assert_eq!(streamed.as_object_mut().unwrap().remove("index"), Some(json!(index)));
            assert_eq!(streamed, whole);
            let id = whole["id"].as_str().unwrap();
            assert!(id.len() == 9 && id.bytes().all(|byte| byte.is_ascii_alphanumeric()));
        }
        let functions: Vec<&Value> = calls.iter().map(|call| &call["function"]).collect();
        let expected = [json!({"name": "f", "arguments": "{\"a\": 1}"}), json!({"name": "g", "arguments": "{}"})];
        assert_eq!(functions, expected.iter().collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_call_that_is_cut_off_ends_by_length_and_text_stays_text() {
        let cut = |text: &str, reason| {
            let calls = Some((Marker::Letters, "request".to_owned()));
            let report =
                Report { kind: Kind::Chat, logprobs: None, token_ids: false, experts: None, stream: false, calls };
            let mut piece = Piece::default();
            piece.add(token(0, text));
            let Event::Finished(end) = finished("") else { unreachable!() };
            piece.add(Event::Finished(Finished { reason, ..end }));
            Choice::new(report, 0, Vec::new(), String::new()).whole(&piece)
        };
        let whole = cut("[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a\": [1", FinishReason::Length);
        assert_eq!(whole["finish_reason"], "length");
        assert_eq!(whole["message"]["tool_calls"][0]["function"]["arguments"], "{\"a\": [1");
        let whole = cut("[TOOL box", FinishReason::Stop);
        assert_eq!((&whole["finish_reason"], &whole["message"]["content"]), (&json!("stop"), &json!("[TOOL box")));
        assert_eq!(whole["message"]["tool_calls"], Value::Null);
    }

    #[tokio::test]
    async fn a_failure_is_the_last_event() {
        let error = GenerateError::Unavailable("expert 3 is away".into());
        let frames = frames(Kind::Completion, false, vec![Ok(token(0, "a")), Err(error), Ok(token(1, "b"))]).await;
        assert_eq!(frames.len(), 2);
        let error = &json(&frames[1])["error"];
        assert_eq!((&error["message"], &error["type"]), (&json!("expert 3 is away"), &json!("server_error")));
    }
}

//! Asking: answers that stream, are asked for again, are kept, and show their experts.

use serde_json::{Value, json};

use super::browser::Browser;
use super::{answered, at_peace};
use crate::openai::cluster;

/// Enter, as WebDriver writes it.
const ENTER: &str = "\u{e007}";
const RIGHT: &str = "\u{e014}";

/// The length of the last answer while it streams; none once it has ended.
const GROWING: &str = "const text = [...document.querySelectorAll('.text')].at(-1); \
    return document.querySelector('#stop').hidden ? 'ended' : text.textContent.length > LEAST && text.textContent.length";

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_streams_is_asked_for_again_and_is_still_there_after_a_reload() {
    let (_process, _, http) = cluster(&[]);
    let browser = Browser::open(&format!("http://{http}/")).await;
    browser.picture("empty").await;
    browser.click("#toggle-settings").await;
    browser.fill("#max-tokens", "300").await;
    browser.click("#toggle-settings").await;
    browser.type_into("#question", &format!("In the beginning God{ENTER}")).await;
    let first = browser.until("some text", &GROWING.replace("LEAST", "0")).await;
    let more = browser.until("more text", &GROWING.replace("LEAST", &first.to_string())).await;
    assert!(more.as_u64() > first.as_u64(), "the answer came at once: {first}, then {more}");
    answered(&browser).await;
    let notes = browser.text(".notes").await;
    for part in ["300 tokens", "tokens/s", "first after", "token limit"] {
        assert!(notes.contains(part), "{part:?} is not in {notes:?}");
    }
    assert_eq!(browser.text(".question p").await, "In the beginning God");

    let before = browser.text(".text").await;
    browser.click_button("Regenerate").await;
    answered(&browser).await;
    let after = browser.text(".text").await;
    assert_ne!(after, before, "a new seed says something else");
    assert_eq!(browser.count(".turn").await, 1);

    browser.reload().await;
    assert_eq!(browser.text(".text").await, after);
    assert_eq!(browser.text(".choose[aria-current]").await, "In the beginning God");

    browser.click_button("Edit").await;
    browser.fill("#question", &format!("<img src=x onerror=alert(1)> & <b>bold</b>{ENTER}")).await;
    answered(&browser).await;
    assert_eq!(browser.count(".turn").await, 1, "the edited question replaces its turn");
    assert_eq!(browser.text(".question p").await, "<img src=x onerror=alert(1)> & <b>bold</b>");
    assert_eq!(browser.count(".turn img, .turn b").await, 0, "what is said is text, never HTML");

    browser.click("#new").await;
    assert_eq!(browser.count(".turn").await, 0);
    assert_eq!(browser.count(".choose").await, 1);
    at_peace(&browser, &http).await;
    browser.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_expert_view_shows_what_the_gate_chose_for_every_token() {
    let (_process, _, http) = cluster(&[]);
    let browser = Browser::open(&format!("http://{http}/")).await;
    let models: Value = browser.script("return fetch('/v1/models').then((answer) => answer.json())").await;
    let experts = models["data"][0]["experts"].clone();
    let figure = |name: &str| experts[name].as_u64().unwrap() as usize;
    let (layers, width, top_k) = (figure("layers"), figure("per_layer"), figure("per_token"));
    browser.click("#toggle-settings").await;
    browser.fill("#max-tokens", "120").await;
    browser.fill("#seed", "3").await;
    browser.click("#toggle-settings").await;
    browser.click("#examples button").await;
    answered(&browser).await;
    assert!(browser.text(".text").await.starts_with("In the beginning God"), "a completion goes on from its prompt");
    assert_eq!(browser.script("return document.querySelector('input[name=mode]:checked').value").await, "completion");

    browser.click_button("Experts").await;
    assert_eq!(browser.count(".chip").await, 120);
    let chips =
        browser.script("return [...document.querySelectorAll('.chip')].map((chip) => chip.textContent).join('')").await;
    let said = browser.text(".text").await["In the beginning God".len()..].replace(' ', "·").replace('\n', "⏎");
    assert_eq!(chips, said.as_str(), "the tokens are the answer");

    let used = "return [...document.querySelectorAll('TABLE tbody tr')].map((row) => \
        [...row.querySelectorAll('td')].map((cell) => Number(cell.textContent)))";
    let detail = used.replace("TABLE", ".detail .grid");
    browser.click(".chip:nth-child(8)").await;
    for step in 0..4 {
        let weights: Vec<Vec<f64>> = serde_json::from_value(browser.script(&detail).await).unwrap();
        assert_eq!(weights.len(), layers);
        for row in &weights {
            assert_eq!((row.len(), row.iter().filter(|weight| **weight > 0.0).count()), (width, top_k), "{weights:?}");
            assert!((row.iter().sum::<f64>() - 1.0).abs() < 0.011, "{weights:?}");
        }
        let chosen = browser
            .script("return [...document.querySelectorAll('.chip')].findIndex((chip) => chip.ariaSelected === 'true')");
        assert_eq!(chosen.await, json!(7 + step));
        browser.press(RIGHT).await;
    }
    let all = used.replace("TABLE", ".pane:last-child .grid");
    let counts: Vec<Vec<u64>> = serde_json::from_value(browser.script(&all).await).unwrap();
    assert_eq!(counts.iter().map(|row| row.iter().sum()).collect::<Vec<u64>>(), vec![(120 * top_k) as u64; layers]);
    let rows =
        browser.script("return [...document.querySelectorAll('.plain tbody tr')].map((row) => row.textContent)").await;
    assert_eq!(rows.as_array().unwrap().len(), layers);
    assert!(rows[0].as_str().unwrap().contains("expert "), "{rows}");

    browser.script("document.querySelector('.experts').scrollIntoView({block: 'end'})").await;
    browser.picture("experts").await;
    browser.prefer("dark").await;
    browser.picture("experts-dark").await;
    browser.reload().await;
    browser.click_button("Experts").await;
    assert_eq!(browser.count(".chip").await, 120, "experts are kept with their answer");
    at_peace(&browser, &http).await;
    browser.end().await;
}

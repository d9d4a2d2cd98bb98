//! When it does not go well: a person stops an answer, the router has no place, wants a key, or is gone.

use serde_json::json;
use sirocco_testkit::cluster::Cluster;
use sirocco_testkit::etcd::Etcd;

use super::answered;
use super::browser::Browser;
use crate::openai::{cluster, post, send, start, wait_for_log};

const ESCAPE: &str = "\u{e00c}";
const ENTER: &str = "\u{e007}";
const COMPLETIONS: &str = "/v1/completions";

/// Notes everything that the button to ask again ever says.
const WATCH_RETRY: &str = r"
    window.seen = [];
    new MutationObserver(() => {
        const said = document.querySelector('.retry')?.textContent;
        if (said && window.seen.at(-1) !== said) window.seen.push(said);
    }).observe(document.body, { subtree: true, childList: true, characterData: true });";

/// A cluster whose router runs one sequence and lets one wait, and the page in a browser.
async fn crowded(name: &str) -> (Etcd, Cluster, Browser) {
    let etcd = Etcd::start().unwrap();
    let envs = [("RUST_LOG", "debug"), ("SIROCCO_MAX_SEQUENCES", "1"), ("SIROCCO_MAX_QUEUE", "1")];
    let cluster = start(&etcd, name, &envs);
    let browser = Browser::open(&format!("http://{}/", cluster.routers[0].http)).await;
    (etcd, cluster, browser)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_stopped_frees_the_engine_and_stays() {
    let (_etcd, cluster, browser) = crowded("page-stop").await;
    browser.click("#toggle-settings").await;
    browser.fill("#max-tokens", "1900").await;
    browser.click("#toggle-settings").await;
    for (count, stop) in [(1, ESCAPE), (2, "")] {
        browser.type_into("#question", &format!("The file{ENTER}")).await;
        browser
            .until("some text", &format!("return document.querySelectorAll('.text')[{}]?.textContent", count - 1))
            .await;
        if stop.is_empty() {
            browser.click("#stop").await;
        } else {
            browser.press(stop).await;
        }
        answered(&browser).await;
        wait_for_log(&cluster, "its client has left", count);
    }
    let notes =
        browser.script("return [...document.querySelectorAll('.notes')].map((notes) => notes.textContent)").await;
    assert!(notes.as_array().unwrap().iter().all(|notes| notes.as_str().unwrap().ends_with("stopped")), "{notes}");
    assert_eq!(browser.complaints().await, Vec::<String>::new());
    browser.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_and_a_router_that_is_gone_are_said_in_words() {
    let (_etcd, mut cluster, browser) = crowded("page-errors").await;
    let http = cluster.routers[0].http.clone();
    let endless = json!({"prompt": "x", "max_tokens": 2000, "ignore_eos": true, "stream": true});
    let mut running = post(&http, COMPLETIONS, &endless);
    assert!(running.event().is_some());
    let waiting = send(&http, "POST", COMPLETIONS, "", endless.to_string().as_bytes());
    wait_for_log(&cluster, "accepted", 2);

    browser.script(WATCH_RETRY).await;
    browser.type_into("#question", &format!("The file{ENTER}")).await;
    let said = browser.until("an error", "return document.querySelector('.problem p')?.textContent").await;
    assert!(said.as_str().unwrap().contains("the queue of 1 requests is full"), "{said}");
    browser.until("the countdown's end", "return !document.querySelector('.retry').disabled").await;
    assert_eq!(browser.script("return window.seen").await, json!(["Retry in 1 s", "Retry"]));
    browser.picture("busy").await;
    drop((running, waiting));
    wait_for_log(&cluster, "its client has left", 2);
    browser.click(".retry").await;
    answered(&browser).await;
    assert_eq!(browser.count(".problem p").await, 0);
    assert!(!browser.text(".text").await.is_empty());

    cluster.routers[0].process.kill().unwrap();
    browser.type_into("#question", &format!("The file{ENTER}")).await;
    let said = browser.until("an error", "return document.querySelector('.problem p')?.textContent").await;
    assert!(said.as_str().unwrap().contains("cannot be reached"), "{said}");
    assert_eq!(browser.text(".retry").await, "Retry");
    browser.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_key_is_asked_for_when_the_router_wants_one_and_sent_from_then_on() {
    let (_process, _, http) = cluster(&[]);
    let browser = Browser::open(&format!("http://{http}/")).await;
    // Refuses what comes without the key, as a router with keys does, and notes what was sent.
    let guard = r"
        const real = window.fetch;
        window.fetch = async (path, options) => {
            if (options?.headers?.Authorization === 'Bearer secret') return real(path, options);
            return new Response(JSON.stringify({ error: { message: 'no key was given' } }), { status: 401 });
        };";
    browser.script(guard).await;
    browser.type_into("#question", &format!("The file{ENTER}")).await;
    let said = browser.until("an error", "return document.querySelector('.problem p')?.textContent").await;
    assert_eq!(said, "The router asks for an API key. no key was given");
    assert_eq!(browser.script("return document.activeElement.id").await, "api-key");
    browser.type_into("#api-key", "secret").await;
    browser.click(".retry").await;
    answered(&browser).await;
    assert_eq!(browser.count(".problem p").await, 0);
    let kept = browser.script("return JSON.stringify(localStorage).includes('secret')").await;
    assert_eq!(kept, false, "a key outlives no tab");
    browser.end().await;
}

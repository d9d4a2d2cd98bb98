//! The chat page in a real browser, against real clusters.

mod access;
mod answers;
mod browser;
mod troubles;

use browser::Browser;

/// Waits until no answer is under way and the last one has its figures.
async fn answered(browser: &Browser) {
    let script =
        "return document.querySelector('#stop').hidden && document.querySelectorAll('.answer[aria-busy=false]').length";
    browser.until("the answer", script).await;
}

/// Asserts that the page is under its policy, has complained of nothing and reached nobody but the router at `http`.
async fn at_peace(browser: &Browser, http: &str) {
    let names = "['content-security-policy', 'cache-control', 'x-content-type-options']";
    let headers = format!("return fetch('/').then((page) => {names}.map((name) => page.headers.get(name)))");
    let headers = browser.script(&headers).await;
    let policy = headers[0].as_str().unwrap();
    assert!(
        policy.starts_with("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"),
        "{policy}"
    );
    assert_eq!(headers.as_array().unwrap()[1..], ["no-store", "nosniff"]);
    assert_eq!(browser.complaints().await, Vec::<String>::new());
    let own = format!("http://{http}/");
    let requests = browser.requests().await;
    assert!(!requests.is_empty());
    for request in requests {
        assert!(request.starts_with(&own) || request.starts_with("data:"), "{request} is not from the router");
    }
}

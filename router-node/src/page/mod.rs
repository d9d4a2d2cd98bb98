//! The chat page at `/`: plain files, part of the program, that talk to `/v1` like any other client.
//!
//! It needs nothing from elsewhere: its policy has the browser load and reach only this router. It never has inline scripts or
//! styles, and never sees what `/v1` would not give to anyone.

use axum::Router;
use axum::http::{HeaderName, HeaderValue, header};
use axum::routing::{MethodRouter, get};

/// What the browser may do: everything from here, pictures also from the page's own data, and no frames around it.
const POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
);

/// The same on every answer. Nothing is stored, so that a new router's page is never mixed with an old one's.
const HEADERS: [(HeaderName, HeaderValue); 4] = [
    (header::CONTENT_SECURITY_POLICY, POLICY),
    (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
    (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
];

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

/// Every file of the page: where it is, what it is, what is in it.
const FILES: [(&str, &str, &str); 12] = [
    ("/", HTML, include_str!("assets/index.html")),
    ("/page/page.css", CSS, include_str!("assets/page.css")),
    ("/page/icon.svg", SVG, include_str!("assets/icon.svg")),
    ("/page/theme.js", SCRIPT, include_str!("assets/theme.js")),
    ("/page/main.js", SCRIPT, include_str!("assets/main.js")),
    ("/page/api.js", SCRIPT, include_str!("assets/api.js")),
    ("/page/conversation.js", SCRIPT, include_str!("assets/conversation.js")),
    ("/page/storage.js", SCRIPT, include_str!("assets/storage.js")),
    ("/page/settings.js", SCRIPT, include_str!("assets/settings.js")),
    ("/page/view.js", SCRIPT, include_str!("assets/view.js")),
    ("/page/text.js", SCRIPT, include_str!("assets/text.js")),
    ("/page/experts.js", SCRIPT, include_str!("assets/experts.js")),
];

/// The page's routes.
pub(crate) fn routes() -> Router {
    FILES.iter().fold(Router::new(), |routes, (path, kind, text)| routes.route(path, file(kind, text)))
}

fn file(kind: &'static str, text: &'static str) -> MethodRouter {
    get(move || async move { (HEADERS, [(header::CONTENT_TYPE, kind)], text) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_page_loads_is_served_and_nothing_is_inline() {
        let served = |path: &str| FILES.iter().any(|(at, ..)| *at == path);
        let (_, _, html) = FILES[0];
        let references: Vec<&str> = ["src=\"", "href=\"/"].iter().flat_map(|start| html.split(start).skip(1)).collect();
        assert!(references.len() >= 4);
        for reference in references {
            let path = reference.split('"').next().unwrap();
            assert!(served(path) || served(&format!("/{path}")), "{path}");
        }
        for (at, kind, text) in FILES {
            let imports = text.lines().filter(|line| kind == SCRIPT && line.contains(" from './"));
            for import in imports {
                let name = import.split("'./").nth(1).unwrap().split('\'').next().unwrap();
                assert!(served(&format!("/page/{name}")), "{at} imports {name}");
            }
            for forbidden in ["innerHTML", "insertAdjacentHTML", "document.write", "eval(", " style=\"", " onclick="] {
                assert!(!text.contains(forbidden), "{at} has {forbidden}");
            }
            assert!(!text.contains("https://"), "{at} names another origin");
        }
        assert!(!html.contains("<script>") && !html.contains("<style>"));
    }
}

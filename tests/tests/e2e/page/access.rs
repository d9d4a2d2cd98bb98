//! Whoever uses it, however: by keyboard, with a screen reader, in the dark, on a small screen.

use super::browser::Browser;
use super::{answered, at_peace};
use crate::openai::cluster;

const TAB: &str = "\u{e004}";
const ENTER: &str = "\u{e007}";
const SHIFT: &str = "\u{e008}";
const RELEASE: &str = "\u{e000}";
const DOWN: &str = "\u{e015}";

const CONTROLS: &str = "button, input, textarea, a[href], [role=option], [tabindex='0'], summary";

/// Texts with less contrast to their ground than 4.5, with their colours.
const FAINT: &str = r"
    const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
    const rgb = (color) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = (color) => {
        const [r, g, b] = color.map((x) => x / 255).map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (element) => {
        for (let at = element; at; at = at.parentElement) {
            const color = rgb(getComputedStyle(at).backgroundColor);
            if (color[3] === 255) return color;
        }
        return [255, 255, 255, 255];
    };
    const faint = [];
    let seen = 0;
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node = walk.nextNode(); node; node = walk.nextNode()) {
        const element = node.parentElement;
        if (!node.textContent.trim() || !element.checkVisibility() || element.disabled) continue;
        if (['SCRIPT', 'STYLE', 'NOSCRIPT'].includes(element.tagName)) continue;
        seen += 1;
        const [a, b] = [light(rgb(getComputedStyle(element).color)), light(ground(element))];
        const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (contrast < 4.5) faint.push(`${contrast.toFixed(2)}: ${node.textContent.trim().slice(0, 40)}`);
    }
    return seen < 30 ? ['too little was seen'] : faint;";

#[tokio::test(flavor = "multi_thread")]
async fn every_control_has_a_name_and_every_text_stands_out_in_light_and_dark() {
    let (_process, _, http) = cluster(&[]);
    let browser = Browser::open(&format!("http://{http}/")).await;
    let landmarks = browser.told("header.bar, nav, main, aside, form#ask").await;
    let roles: Vec<&str> = landmarks.iter().map(|(role, ..)| role.as_str()).collect();
    assert_eq!(roles, ["banner", "navigation", "main", "form"]);

    browser.click("#toggle-settings").await;
    browser.fill("#max-tokens", "24").await;
    browser.type_into("#question", &format!("The file{ENTER}")).await;
    answered(&browser).await;
    browser.click_button("Experts").await;
    browser.click("summary").await;
    let told = browser.told(CONTROLS).await;
    assert!(told.len() > 50, "{} controls", told.len());
    for (role, name, html) in told {
        assert!(!name.trim().is_empty(), "without a name: {role}: {html}");
        let roles =
            ["button", "checkbox", "textbox", "spinbutton", "radio", "link", "option", "region", "DisclosureTriangle"];
        assert!(roles.contains(&role.as_str()), "{role}: {html}");
    }
    let (role, name, _) = browser.told("aside").await.remove(0);
    assert_eq!((role.as_str(), name.as_str()), ("complementary", "Settings"));
    let spoken = browser.text("#status").await;
    assert!(spoken.contains("Answer complete"), "{spoken:?}");

    let paper = "return getComputedStyle(document.body).backgroundColor";
    let light = browser.script(paper).await;
    assert_eq!(browser.script(FAINT).await, serde_json::json!([]));
    browser.prefer("dark").await;
    let dark = browser.script(paper).await;
    assert_ne!(dark, light, "the page follows the system");
    assert_eq!(browser.script(FAINT).await, serde_json::json!([]));
    browser.picture("settings-dark").await;
    browser.click("#theme").await;
    assert_eq!(browser.script(paper).await, light, "light was chosen");
    browser.reload().await;
    assert_eq!(browser.script(paper).await, light, "and is remembered");
    browser.click("#theme").await;
    browser.prefer("light").await;
    assert_eq!(browser.script(paper).await, dark, "dark was chosen");
    at_peace(&browser, &http).await;
    browser.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_keyboard_alone_is_enough() {
    let (_process, _, http) = cluster(&[]);
    let browser = Browser::open(&format!("http://{http}/")).await;
    let focus = "const at = document.activeElement; return at === document.body ? '' : at.id || at.textContent.trim()";
    let mut steps = 0;
    while browser.script(focus).await != "Skip to the question" {
        assert!(steps < 20, "the skip link is not reached");
        steps += 1;
        browser.press(&format!("{SHIFT}{TAB}")).await;
    }
    browser.press(ENTER).await;
    assert_eq!(browser.script(focus).await, "question");
    browser.press(&format!("one{SHIFT}{ENTER}{RELEASE}two")).await;
    assert_eq!(browser.script("return document.activeElement.value").await, "one\ntwo");
    assert_eq!(browser.count(".turn").await, 0, "Shift and Enter send nothing");

    // Once around by Tab: all that can be reached shows that it is.
    let mut reached = Vec::new();
    for _ in 0..20 {
        let outline = "const at = document.activeElement; const shown = (element) => getComputedStyle(element).outlineStyle !== 'none'; \
            return shown(at) || shown(at.parentElement) || shown(at.nextElementSibling ?? at)";
        reached.push(browser.script(focus).await.as_str().unwrap().to_owned());
        if reached.last().is_some_and(|id| !id.is_empty()) {
            assert_eq!(browser.script(outline).await, true, "the focus is not seen on {:?}", reached.last());
        }
        browser.press(TAB).await;
    }
    for id in ["question", "send", "toggle-list", "theme", "toggle-settings", "new"] {
        assert!(reached.iter().any(|reached| reached == id), "{id} is not reached: {reached:?}");
    }
    browser.script("document.querySelector('#question').focus()").await;
    browser.press(ENTER).await;
    answered(&browser).await;

    let mut steps = 0;
    browser.script("document.querySelector('.turn').closest('#scroll').focus()").await;
    while browser.script(focus).await != "Experts" {
        assert!(steps < 10, "Experts is not reached");
        steps += 1;
        browser.press(TAB).await;
    }
    browser.press(ENTER).await;
    browser.press(TAB).await;
    browser.press(DOWN).await;
    let label = browser.script("return document.activeElement.ariaLabel").await;
    assert!(label.as_str().unwrap().starts_with("Token 2:"), "{label}");
    assert!(browser.text(".detail h3").await.starts_with("Token 2"));
    at_peace(&browser, &http).await;
    browser.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_screen_shows_all_of_it() {
    let (_process, _, http) = cluster(&[]);
    let browser = Browser::open(&format!("http://{http}/")).await;
    browser.resize(360, 740).await;
    browser.reload().await;
    let fits = "return [document.documentElement.scrollWidth, document.querySelector('#scroll').scrollWidth, \
        document.querySelector('.bar').scrollWidth].every((width) => width <= 360)";
    assert_eq!(browser.script(fits).await, true);
    browser.type_into("#question", &format!("In the beginning God created{ENTER}")).await;
    answered(&browser).await;
    assert_eq!(browser.script(fits).await, true);
    browser.picture("narrow").await;
    browser.click_button("Experts").await;
    assert_eq!(browser.script(fits).await, true);
    browser.picture("narrow-experts").await;
    for (panel, button) in [("#list", "#toggle-list"), ("#settings", "#toggle-settings")] {
        let shown = format!("return document.querySelector({panel:?}).checkVisibility()");
        assert_eq!(browser.script(&shown).await, false, "{panel} does not cover the conversation");
        browser.click(button).await;
        assert_eq!(browser.script(&shown).await, true);
        browser.click(button).await;
    }
    at_peace(&browser, &http).await;
    browser.end().await;
}

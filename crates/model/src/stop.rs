//! Ends a completion before a stop string, however the string is cut into tokens.

/// Lets text through and holds back what may begin a stop string.
#[derive(Clone, Debug, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

impl StopMatcher {
    /// A matcher for `stops`, none of them empty.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new() }
    }

    /// Takes the next piece of text. Returns what may be shown now, and whether a stop string has come; nothing after it counts.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        let first = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(start) = first {
            self.held.truncate(start);
            return (std::mem::take(&mut self.held), true);
        }
        let kept = self.stops.iter().map(|stop| longest_start(stop, &self.held)).max().unwrap_or(0);
        let shown = self.held.len() - kept;
        (self.held.drain(..shown).collect(), false)
    }

    /// What was held back, once the completion has ended otherwise.
    pub fn finish(self) -> String {
        self.held
    }
}

/// Bytes of the longest proper start of `stop` that `text` ends with.
fn longest_start(stop: &str, text: &str) -> usize {
    let starts = stop.char_indices().map(|(end, _)| end).rev();
    starts.into_iter().find(|end| text.ends_with(&stop[..*end])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_stop_string_cut_into_tokens_is_found() {
        let mut matcher = StopMatcher::new(vec!["END".into(), "\n\n".into()]);
        assert_eq!(matcher.push("a\n"), ("a".into(), false));
        assert_eq!(matcher.push("bE"), ("\nb".into(), false));
        assert_eq!(matcher.push("N"), (String::new(), false));
        assert_eq!(matcher.push("xEN"), ("ENx".into(), false));
        assert_eq!(matcher.push("Dtail"), (String::new(), true));
    }

    proptest! {
        #[test]
        fn the_text_before_the_first_stop_is_shown_whole(
            text in "[abé]{0,24}", stops in proptest::collection::vec("[abé]{1,3}", 0..3),
        ) {
            let expected = stops.iter().filter_map(|s| text.find(s.as_str())).min().map_or(text.as_str(), |i| &text[..i]);
            let mut matcher = StopMatcher::new(stops.clone());
            let mut shown = String::new();
            let mut stopped = false;
            for c in text.chars() {
                let (piece, stop) = matcher.push(&c.to_string());
                shown += &piece;
                stopped = stop;
                if stop {
                    break;
                }
            }
            if !stopped {
                shown += &matcher.finish();
            }
            // Of overlapping stops the one that is complete first ends the text.
            let completed = |s: &String| text.find(s.as_str()).map(|i| (i + s.len(), i));
            let first_complete = stops.iter().filter_map(completed).map(|(end, _)| end).min();
            let longest = first_complete.map(|end| {
                stops.iter().filter_map(|s| text[..end].find(s.as_str())).min().unwrap_or(end)
            });
            prop_assert_eq!(&shown, longest.map_or(text.as_str(), |i| &text[..i]));
            prop_assert!(shown.len() >= expected.len());
        }
    }
}
